"""Learned worlds to act in: a world model that is stepped with actions, as a function and as an environment."""
