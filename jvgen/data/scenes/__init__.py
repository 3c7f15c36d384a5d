"""The built-in data set of procedural scenes: what is in a scene, its captions and labels, and the renderer. Evaluation
parses labels from captions with it. Writing scenes to disk belongs in `builders`.
"""
