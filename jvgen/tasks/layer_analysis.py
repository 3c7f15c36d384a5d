"""Statistics of a video DiT by layer on noisy held-out clips: similarity of neighboring frames, and attention."""

from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jvgen.diffusion.objective import draw_noise
from jvgen.diffusion.schedule import Schedule
from jvgen.evaluation.layer_metrics import attention_between, frame_similarity
from jvgen.models.video_dit.model import TokenLayout, VideoDiT
from jvgen.models.video_dit.probe import LayerActivations, probe_layers
from jvgen.nn.frame_diagonal import mean_diagonal
from jvgen.nn.network import Parameters
from jvgen.tasks.given_latents import GivenLatents
from jvgen.tasks.task import Batch, activation_dtype

# Maximum resolution of an attention map.
MAX_CELLS = 64


class Denoising(Protocol):
    """The parts of a text-to-video task that the analysis uses."""

    schedule: Schedule
    given: GivenLatents

    def bound_denoiser(self, parameters: Parameters) -> VideoDiT: ...

    def clean_latents(self, frozen: Parameters, batch: Batch, key: jax.Array) -> jax.Array: ...

    def text_embeddings(self, parameters: Parameters, frozen: Parameters, tokens: jax.Array) -> jax.Array: ...

    def with_given(self, noisy: jax.Array, given: jax.Array | None) -> jax.Array: ...

    def offsets(self, timesteps: jax.Array) -> jax.Array | None: ...


def analyze_layers(
    task: Denoising, parameters: Parameters, frozen: Parameters, batch: Batch, key: jax.Array, timestep: jax.Array
) -> dict[str, jax.Array]:
    """Statistics of every layer on a batch of clips at one noise level, averaged over the clips. Traced under jit.

    Returns:
      By name, float32, with a leading axis of layers: "similarity_before", "similarity_mean", "similarity_read" and
      "similarity_after" `G F-1` (cosine similarity of neighboring frames in the output of the previous layer, in the
      mean over layers, in the input of the layer, in its output), "attention_of_frames" `G F+1 F+1` (text first),
      "attention_of_rows" `G K K` (segments of the sequence in order) and "intensity" `G N` (attention across frames per
      head, as Enhance-A-Video measures it).
    """
    clean = task.given.padded(task.clean_latents(frozen, batch, key))
    given = task.given.condition(frozen, task.given.batch_frames(batch), key, batch["slot"], clean.shape[1])
    timesteps = jnp.full((clean.shape[0],), timestep, jnp.float32)
    noisy = task.schedule.add_noise(clean, draw_noise(key, clean.shape, batch["slot"]), timesteps)
    text = task.text_embeddings(parameters, frozen, batch[task.text.field])
    weights = {**frozen, **parameters}
    dtype = activation_dtype(weights["denoiser"])
    model = task.bound_denoiser(weights)
    layout = model.layout(noisy.shape[1:4], text.shape[1])
    context = model.context(timesteps, layout, offsets=task.offsets(timesteps))
    tokens = model.embed(task.with_given(noisy, given).astype(dtype), text.astype(dtype), layout)
    return probe_layers(model, tokens, context, _measure)[1]


def _measure(layer: LayerActivations) -> dict[str, jax.Array]:
    layout = layer.layout
    frames = layout.grid[0]
    found = {}
    if frames > 1:
        rows_of = {"before": layer.hidden, "mean": layer.mean, "read": layer.read, "after": layer.output}
        for name, rows in rows_of.items():
            video = rearrange(rows[:, layout.text : layout.valid], "b (f p) d -> b f p d", f=frames)
            found[f"similarity_{name}"] = jnp.mean(frame_similarity(video), axis=0)
        diagonal = mean_diagonal(layer.query, layer.key, frames=frames, start=layout.text, stop=layout.valid)
        found["intensity"] = (1.0 - jnp.mean(diagonal, axis=0)) / (frames - 1)
    for name, groups in {"frames": frame_groups(layout), "rows": row_groups(layout)}.items():
        between = attention_between(layer.query, layer.key, groups, int(groups.max()) + 1)
        found[f"attention_of_{name}"] = jnp.mean(between, axis=(0, 1))
    return found


def frame_groups(layout: TokenLayout) -> np.ndarray:
    """0 for rows of text, 1 + f for those of frame f, -1 for padding."""
    places = layout.grid[1] * layout.grid[2]
    groups = np.concatenate([np.zeros(layout.text, int), 1 + np.arange(layout.grid[0] * places) // places])
    return np.concatenate([groups, np.full(layout.padding, -1)])


def row_groups(layout: TokenLayout) -> np.ndarray:
    """Segments of the sequence of about equal length, at most `MAX_CELLS`, -1 for padding."""
    cells = min(MAX_CELLS, layout.valid)
    return np.concatenate([np.arange(layout.valid) * cells // layout.valid, np.full(layout.padding, -1)])
