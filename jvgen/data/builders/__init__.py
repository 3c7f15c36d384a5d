"""Builders of data sets: one module per origin (scenes, folders of media, tables, tar shards, robot episodes, LeRobot,
images and videos with cameras, RealEstate10K, WebVid, TFDS, latents of another data set), each on top of `build_loop`.
The format that they write belongs in `store`; nothing here runs during training.
"""
