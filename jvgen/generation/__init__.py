"""Clips from published weights: a pipeline run network after network on the devices of this machine."""
