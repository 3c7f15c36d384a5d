"""CV-VAE: a video autoencoder whose latents an image autoencoder's decoder reads, and the other way round."""
