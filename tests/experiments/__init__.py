"""Experiments that take hours and are not tests: each is one command that writes a table and what is behind it."""
