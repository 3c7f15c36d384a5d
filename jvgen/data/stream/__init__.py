"""The input pipeline of training and evaluation: its configuration, the plan (a pure function of seed and step), the
decoding and transforming of examples, and the loader of batches. What a task does with an example belongs in
`jvgen.tasks`, the format on disk in `store`.
"""
