"""Stable Diffusion's AutoencoderKL (arXiv 2112.10752), with 4 or 16 latent channels."""
