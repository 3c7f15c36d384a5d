"""A patch discriminator of images and clips, for the adversarial training of autoencoders."""
