"""From a data set to batches: the plan (a pure function of seed and step), mixing, buckets, and the loader that
reads, decodes and augments what the plan names. It writes nothing to data sets.
"""
