"""Parameters of a network by path and shape, without allocating one."""

from jvgen.models import Network, VideoDiT, VideoDiTConfig
from jvgen.nested import flatten

config = VideoDiTConfig(layers=2, heads=2, head_width=16, in_channels=4, out_channels=4, text_width=8)
network = Network.of(lambda rngs: VideoDiT(config, rngs=rngs))
shapes = {path: leaf.shape for path, leaf in flatten(network.shapes).items()}
for path, shape in shapes.items():
    print(path, shape)
