"""Losses on images, clips and scores: reconstruction, perceptual distance, adversarial terms, frame mappings
of CV-VAE. Diffusion targets are in `jvgen.diffusion`.
"""
