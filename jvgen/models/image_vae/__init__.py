"""Stable Diffusion's autoencoder, AutoencoderKL (arXiv 2112.10752), with 4 or 16 latent channels: the network, its
configuration, FLOPs, Gaussian posterior, and tensor names in PyTorch. Its training is `jvgen.tasks.image_vae`.
"""
