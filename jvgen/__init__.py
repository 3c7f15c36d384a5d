"""Pretraining of video generators at pod scale, in JAX."""

__version__ = "0.1.0"
