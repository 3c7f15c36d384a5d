"""What a video DiT does layer by layer with noisy held-out clips: features of neighbouring frames, and attention."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jvgen.diffusion.objective import draw_noise
from jvgen.diffusion.schedule import Schedule
from jvgen.evaluation.features import attention_between, frame_similarity
from jvgen.models.video_dit.enhance import mean_diagonal
from jvgen.models.video_dit.model import TokenLayout
from jvgen.models.video_dit.watch import LayerView, watch_layers
from jvgen.nn.network import Network, Parameters
from jvgen.tasks.task import Batch, activation_dtype

# Most groups of rows that a map of attention shows: more would not be seen.
CELLS = 64


class Denoising(Protocol):
    """What is needed of a text-to-video task."""

    networks: dict[str, Network]
    schedule: Schedule

    def clean_latents(self, frozen: Parameters, batch: Batch, key: jax.Array) -> jax.Array: ...

    def text_embeddings(self, parameters: Parameters, frozen: Parameters, tokens: jax.Array) -> jax.Array: ...


def look_at_layers(
    task: Denoising, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array, timestep: jax.Array
) -> dict[str, jax.Array]:
    """Measures of every layer on a batch of clips at one noise level, averaged over the clips. Traced under jit.

    Returns:
      By name, float32, with a leading axis of layers: "similarity_before", "similarity_mean", "similarity_read" and
      "similarity_after" `[G F-1]` (cosines of neighbouring frames of what the layer before left, of the mean over
      layers, of what the layer computes with, of what it leaves), "attention_of_frames" `[G F+1 F+1]` (text first),
      "attention_of_rows" `[G K K]` (stretches of the sequence in order) and "intensity" `[G N]` (attention across
      frames by head, as Enhance-A-Video measures it).
    """
    clean = task.clean_latents(frozen, batch, key)
    timesteps = jnp.full((clean.shape[0],), timestep, jnp.float32)
    noisy = task.schedule.add_noise(clean, draw_noise(key, clean.shape, batch["slot"]), timesteps)
    text = task.text_embeddings(parameters, frozen, batch["tokens"])
    dtype = activation_dtype(parameters["denoiser"])
    model: Any = task.networks["denoiser"].bind(parameters["denoiser"])
    layout = model.layout(noisy.shape[1:4], text.shape[1])
    context = model.context(timesteps, layout)
    tokens = model.embed(noisy.astype(dtype), text.astype(dtype), layout)
    return watch_layers(model, tokens, context, _measure)[1]


def _measure(view: LayerView) -> dict[str, jax.Array]:
    layout = view.layout
    frames = layout.grid[0]
    found = {}
    if frames > 1:
        for name, rows in {"before": view.hidden, "mean": view.mean, "read": view.read, "after": view.output}.items():
            video = rearrange(rows[:, layout.text : layout.valid], "b (f p) d -> b f p d", f=frames)
            found[f"similarity_{name}"] = jnp.mean(frame_similarity(video), axis=0)
        own = jnp.mean(mean_diagonal(view.query, view.key, layout), axis=0)
        found["intensity"] = (1.0 - own) / (frames - 1)
    for name, groups in {"frames": frame_groups(layout), "rows": row_groups(layout)}.items():
        between = attention_between(view.query, view.key, groups, int(groups.max()) + 1)
        found[f"attention_of_{name}"] = jnp.mean(between, axis=(0, 1))
    return found


def frame_groups(layout: TokenLayout) -> np.ndarray:
    """0 for rows of text, 1 + f for those of frame f, -1 for padding."""
    places = layout.grid[1] * layout.grid[2]
    groups = np.concatenate([np.zeros(layout.text, int), 1 + np.arange(layout.grid[0] * places) // places])
    return np.concatenate([groups, np.full(layout.padding, -1)])


def row_groups(layout: TokenLayout) -> np.ndarray:
    """Stretches of the sequence of about equal length, at most `CELLS`, -1 for padding."""
    cells = min(CELLS, layout.valid)
    return np.concatenate([np.arange(layout.valid) * cells // layout.valid, np.full(layout.padding, -1)])
