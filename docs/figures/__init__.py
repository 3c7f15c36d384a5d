"""Figures of the documentation: `python -m docs.figures` draws all of them, each for light and dark pages."""
