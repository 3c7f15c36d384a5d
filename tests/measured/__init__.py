"""docs/measured.md held to its rules, and its cheap rows run again: `python -m tests.measured`."""
