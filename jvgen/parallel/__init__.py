"""How arrays are sharded: logical axis names, the device mesh, rules from names to mesh axes, and a table of chips.

Layers and the training loop do not belong here.
"""
