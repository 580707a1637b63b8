"""Composition root and control loop: starts, watches and replaces workers."""
