"""Attention along epipolar lines: the bias of a tile follows from three numbers per query and three per key, so it is
never stored. `reference` is the oracle of the tests.
"""
