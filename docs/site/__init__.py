"""The documentation site: `make docs`, or `python -m docs.site`.

Markdown files of the repository are staged as pages (`staging`), pages are written from docstrings, config classes and
the command's parsers (`reference`), and Sphinx builds HTML of them without a network (`conf`, `mathml`).
"""
