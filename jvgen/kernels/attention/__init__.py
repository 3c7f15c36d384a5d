"""Attention, one file a backend; the reference is the oracle of every test."""
