"""CogVideoX's causal 3-D autoencoder (arXiv 2408.06072, section 2.1), 4x8x8 pixels per latent: the network, its
configuration, FLOPs, diffusers' tiling, and tensor names in PyTorch. Videos of any length are coded by
`jvgen.autoencoding`.
"""
