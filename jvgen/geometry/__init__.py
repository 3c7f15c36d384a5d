"""Camera geometry as pure functions of arrays: poses, camera files, epipolar lines, Plücker rays, homographies, paths.

Functions take numpy or JAX arrays and know nothing of networks or data sets.
"""
