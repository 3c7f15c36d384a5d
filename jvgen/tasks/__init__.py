"""What is trained: per task its config, its batch, its loss, its metrics and its samples.

The loop that trains it is in `jvgen.training` and knows no task by name.
"""
