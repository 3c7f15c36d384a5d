"""The video diffusion transformer of CogVideoX (arXiv 2408.06072), with RepVideo's aggregation (2501.08994) and
Enhance-A-Video (2502.07508).
"""
