"""Endless videos being made: the one function that advances a batch of them, and their whole state."""
