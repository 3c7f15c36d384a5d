"""A small text encoder over bytes, trained along with what it conditions."""
