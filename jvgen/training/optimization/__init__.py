"""Optimizers, learning-rate schedules, EMA, guards against bad steps, and patterns over parameter paths."""
