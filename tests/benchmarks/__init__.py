"""Timings against PyTorch on the same cores: `python -m tests.benchmarks`; README.md says how to read them."""
