"""CV-VAE (arXiv 2405.20279): a video autoencoder whose latents an image autoencoder's decoder can read, and the
reverse.
"""
