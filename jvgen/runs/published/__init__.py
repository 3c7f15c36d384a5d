"""Pipelines of published weights: load a whole CogVideoX or RepVideo pipeline, place its stages, sample from it."""
