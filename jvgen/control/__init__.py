"""World models to act in: reset, step and rollout with checked input, a gymnasium environment, interactive episodes.
Agents, replays and imagined experience too; runs that put them together are in `jvgen.reinforcement`. The networks are
in `jvgen.models.ivideogpt`, their training in `jvgen.tasks`.
"""
