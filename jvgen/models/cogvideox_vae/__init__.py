"""CogVideoX's causal three-dimensional autoencoder."""
