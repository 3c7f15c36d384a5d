"""A small text encoder over bytes, trained together with the network that it conditions.

For demos and tests; published models use `jvgen.models.t5`.
"""
