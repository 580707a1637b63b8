"""Nouns of the whole system. A thing enters when three rooms need it."""
