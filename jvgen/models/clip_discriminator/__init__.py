"""A patch discriminator of images and clips for the adversarial training of autoencoders: the network, its
configuration and FLOPs. Its losses are in `jvgen.losses.adversarial`.
"""
