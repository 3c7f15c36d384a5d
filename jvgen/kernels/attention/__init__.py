"""Attention, one file per backend: splash attention on TPU, cuDNN on GPU, and two in plain JAX.

`reference` is the oracle of the tests.
"""
