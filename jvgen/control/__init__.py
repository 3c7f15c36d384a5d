"""Acting in learned worlds: a world model that is stepped with actions, as a function and as a gymnasium environment.
The networks are in `jvgen.models.ivideogpt`, their training in `jvgen.tasks`.
"""
