"""Kernels, one folder per operation and one file per backend; the reference implementation is the oracle of every
test. Which one runs is chosen by the dispatchers in `jvgen.nn`.
"""
