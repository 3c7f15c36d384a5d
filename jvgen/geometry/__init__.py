"""Cameras and what they imply, as pure functions of arrays."""
