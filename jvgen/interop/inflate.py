"""Initialize a video autoencoder with the weights of an image autoencoder's folder."""

import jax
import numpy as np

from jvgen.config import Config
from jvgen.interop.formats import format_of
from jvgen.interop.from_torch import import_folder, read_config
from jvgen.models.cv_vae.config import CVVAEConfig
from jvgen.models.cv_vae.inflate import check_sizes, inflate
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.nn.network import Parameters
from jvgen.storage import Path


def inflate_folder(folder: str | Path, config: Config) -> Parameters:
    """Parameters of the video autoencoder `config`, inflated from the image autoencoder in a folder; numpy arrays.

    Raises:
      ValueError: another kind of network on either side, or other sizes.
    """
    if not isinstance(config, CVVAEConfig):
        raise ValueError(
            f"--inflate: the run's network is a {type(config).__name__}; only a CVVAEConfig can be inflated."
        )
    image = read_config(folder)
    if not isinstance(image, ImageVAEConfig):
        raise ValueError(f"--inflate: {folder} holds a {type(image).__name__}; name an image autoencoder's folder.")
    check_sizes(image, config)
    network = format_of(config).network(config)
    if config.temporal_attention.kind == "none":
        start = network.shapes
    else:
        start = jax.tree.map(np.asarray, jax.jit(network.init)(jax.random.key(0)))
    return inflate(image, import_folder(folder)[1], config, start)
