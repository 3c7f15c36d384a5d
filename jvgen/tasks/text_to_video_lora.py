"""The LoRA of a text-to-video task: which networks it may be of, and the random keys of its dropout."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax

from jvgen.diffusion.objective import slot_keys
from jvgen.models.t5.config import T5Config
from jvgen.nn import lora
from jvgen.nn.lora import LoraConfig
from jvgen.nn.network import Network
from jvgen.tasks.task import BaseNetwork, Batch
from jvgen.tasks.text_to_video_config import TextToVideoFields

# Purposes folded into the key of a step, besides those of jvgen.tasks.text_to_video; old numbers never change.
LORA_KEY = 22
TEXT_LORA_KEY = 23


def targets(config: LoraConfig, networks: Mapping[str, Network | None], frozen: Iterable[str]) -> dict[str, Any]:
    """The layers that get a LoRA, see `jvgen.nn.lora.targets`.

    Args:
      networks: the denoiser and the text encoder; none in place of one that cached embeddings stand for.
      frozen: names of the task's networks that are not trained.

    Raises:
      ConfigError: a pattern that chooses no layer, or layers of a network that may not get one.
    """
    there = {name: network for name, network in networks.items() if network is not None}
    refused = {name: "which stays as it is in this task" for name in frozen if name not in networks}
    refused |= {
        name: "which the step does not run, because task.text.embeddings names what it made: set that to none"
        for name in networks
        if name not in there
    }
    return lora.targets(config, there, refused)


def base_networks(config: TextToVideoFields) -> dict[str, BaseNetwork]:
    """The networks that a LoRA may be of."""
    is_t5 = isinstance(config.text.encoder, T5Config)
    return {
        "denoiser": BaseNetwork(config.denoiser.plain, config.denoiser_weights),
        "text_encoder": BaseNetwork(config.text.encoder, config.text.weights if is_t5 else config.text_encoder_weights),
    }


def dropout_keys(
    config: LoraConfig | None, batch: Batch, key: jax.Array
) -> tuple[jax.Array, jax.Array] | tuple[None, None]:
    """Keys of dropout, one per sample: of the denoiser's LoRA, and of the text encoder's; none outside of training."""
    if config is None or not config.dropout or "step" not in batch:
        return None, None
    own, of_text = (jax.random.fold_in(key, purpose) for purpose in (LORA_KEY, TEXT_LORA_KEY))
    return slot_keys(own, batch["slot"]), slot_keys(of_text, batch["slot"])
