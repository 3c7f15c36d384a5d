"""World models to act in: reset, step and rollout with checked input, a gymnasium environment, interactive episodes.
The networks are in `jvgen.models.ivideogpt`, their training in `jvgen.tasks`.
"""
