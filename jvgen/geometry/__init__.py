"""Cameras and what follows from them, as pure functions of arrays: rotations, rays, epipolar lines, homographies,
paths. Conventions are stated in `cameras`.
"""
