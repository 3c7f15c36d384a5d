"""Layers that two or more networks share, and the dispatchers that choose a kernel.

Logical axis names are given here, mesh axes never.
"""
