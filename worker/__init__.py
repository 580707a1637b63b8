"""The shell both kinds of worker live in."""
