"""A discriminator of clips and images by patches, for autoencoders."""
