"""CogVideoX's causal 3-D autoencoder (arXiv 2408.06072), 4x8x8, with its frame batches and tiles."""
