"""Measures and pictures: image and video metrics, Fréchet distances, camera poses, plots, contact sheets and HTML
reports, from arrays of numpy. What to measure for a task is decided there.
"""
