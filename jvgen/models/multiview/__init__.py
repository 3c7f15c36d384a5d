"""CVD (arXiv 2405.17414) on the video DiT: several consistent videos of one scene, by synchronization along epipolar
lines.
"""
