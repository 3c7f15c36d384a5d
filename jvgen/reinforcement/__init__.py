"""Model-based reinforcement learning: an agent that acts in an environment and in a world model that learns with it.
The loop is that of `jvgen.training`; what acts, remembers and imagines is in `jvgen.control`.
"""
