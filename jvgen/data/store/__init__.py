"""Data sets on disk: the record and its encoding, the index of a split, and the code that writes, opens and previews a
data set. What records are made from belongs in `builders`, what batches are made of them in `stream`.
"""
