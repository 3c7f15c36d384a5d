"""CV-VAE (arXiv 2405.20279), a video autoencoder that shares its latents with an image autoencoder: the network, its
configuration, FLOPs, published tiling, inflation from an image autoencoder, and tensor names in PyTorch.

Its losses are in `jvgen.tasks.video_vae`; `jvgen.autoencoding` codes videos of any length.
"""
