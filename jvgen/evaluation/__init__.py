"""Metrics of images, clips, cameras and distributions of clips, and what presents them: plots, contact sheets, reports.

Pure functions of arrays. What runs a model to obtain the arrays is in `jvgen.tasks`, `jvgen.runs` and
`jvgen.autoencoding`.
"""
