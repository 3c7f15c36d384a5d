"""Load an exported folder strictly with its original class, and compare outputs on random inputs."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from jvgen.config import Config
from jvgen.interop.file_digests import check_digests
from jvgen.interop.formats import Format, format_of
from jvgen.interop.from_torch import import_folder, open_weights
from jvgen.interop.weights_names import variant_of
from jvgen.nested import flatten
from jvgen.nn.network import Network
from jvgen.storage import Path, as_path, local_copy, read_json_object


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of `verify`.

    Attributes:
      class_name: class that read the folder.
      errors: largest absolute difference by output.
      scales: largest absolute value of the original's output, by output.
    """

    class_name: str
    errors: Mapping[str, float]
    scales: Mapping[str, float]

    @property
    def max_abs_error(self) -> float:
        """The largest difference of all outputs; NaN if one is NaN."""
        return float(np.max(list(self.errors.values())))

    def __str__(self) -> str:
        lines = [
            f"{name}: max abs error {error:.3e} (values up to {self.scales[name]:.3g})"
            for name, error in self.errors.items()
        ]
        return "\n".join([f"{self.class_name} loads strictly.", *lines])


class VerifyError(ValueError):
    """The original class does not load the folder strictly."""


Outputs = Iterator[tuple[str, np.ndarray, np.ndarray]]


def verify(folder: str | Path, config: Config, parameters: Mapping[str, Any], *, seed: int = 0) -> Report:
    """Compare a network with the original library's network from its exported folder, in float32 on the CPU.

    The parameters of a network that no library has are compared with those that `import_folder` reads.

    Args:
      folder: as `export_network` writes it; or a file in it, such as one of a variant.
      config, parameters: of our network.
      seed: of the random inputs.

    Raises:
      VerifyError: missing or unexpected tensors.
      DamagedExport: a file is not what was exported.
      ValueError: torch or the library is not installed.
    """
    weights = local_copy(as_path(folder))
    check_digests(weights.parent if weights.is_file() else weights, reread=True)
    form = format_of(config)
    if form.library in ("jvgen", "paper"):
        outputs = _stored(folder, parameters)
    else:
        outputs = _COMPARISONS[form.class_name](
            _load(form, weights), config, form.network(config), parameters, np.random.default_rng(seed)
        )
    errors, scales = {}, {}
    with _no_gradients(form):
        for name, ours, theirs in outputs:
            ours, theirs = (np.asarray(array, np.float64) for array in (ours, theirs))
            assert ours.shape == theirs.shape, f"{name}: our shape {ours.shape}, theirs {theirs.shape}"
            errors[name] = float(np.abs(ours - theirs).max())
            scales[name] = float(np.abs(theirs).max())
    return Report(form.class_name, errors, scales)


def _load(form: Format, weights: Path) -> Any:
    try:
        if form.library == "diffusers":
            import diffusers as library
        else:
            import transformers as library
        import torch
    except ImportError as error:
        raise ValueError(f"verify needs torch and {form.library}: install jvgen[torch].") from error
    if form.class_name == "LlamaForCausalLM":
        wrapped = _wrapped_llama(form, weights)
        if wrapped is not None:
            return wrapped
    folder = weights if weights.is_dir() else weights.parent
    model, loaded = getattr(library, form.class_name).from_pretrained(
        str(folder),
        torch_dtype=torch.float32,
        output_loading_info=True,
        local_files_only=True,
        variant=variant_of(weights.name) if weights.is_file() else None,
    )
    problems = [
        f"{title.replace('_', ' ')}: {', '.join(str(key) for key in loaded[title])}"
        for title in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        if loaded.get(title)
    ]
    if problems:
        raise VerifyError(f"{form.class_name} does not load {folder} strictly. {'; '.join(problems)}")
    return model.eval()


def _wrapped_llama(form: Format, weights: Path) -> Any | None:
    """The Llama in a file with more heads, which become its attribute `heads`; None for a plain file."""
    import torch
    import transformers

    tensors = open_weights(weights, form)
    folder = weights if weights.is_dir() else weights.parent
    inside = {name.removeprefix("llm."): name for name in tensors if name.startswith("llm.")}
    if not inside:
        return None
    values = read_json_object(folder / "config.json")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values))
    try:
        model.load_state_dict({name: _torch(np.array(tensors[theirs])) for name, theirs in inside.items()}, strict=True)
    except RuntimeError as error:
        raise VerifyError(f"LlamaForCausalLM does not load {folder} strictly. {error}") from error
    model.heads = {name: torch.from_numpy(np.array(tensors[name])) for name in tensors if name not in inside.values()}
    return model.eval()


@contextlib.contextmanager
def _no_gradients(form: Format) -> Iterator[None]:
    if form.library in ("jvgen", "paper"):
        yield
        return
    import torch

    with torch.no_grad():
        yield


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def _torch(array: np.ndarray, *order: int) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(array.transpose(order) if order else array))


def _stored(folder: str | Path, parameters: Mapping[str, Any]) -> Outputs:
    ours, stored = flatten(parameters), flatten(import_folder(folder)[1])
    for path, array in stored.items():
        yield path, np.asarray(ours[path]), array


def _image_vae(
    model: Any, config: Any, network: Network, parameters: Mapping[str, Any], rng: np.random.Generator
) -> Outputs:
    side = 4 * config.downsampling
    images = _normal(rng, 2, side, side, config.channels)
    latents = _normal(rng, 2, 4, 4, config.latent_channels)
    moments = jax.jit(lambda p, x: network.apply(p, x, method="encode"))(parameters, images)
    theirs = model.encode(_torch(images, 0, 3, 1, 2)).latent_dist.parameters
    yield "moments", moments, theirs.numpy().transpose(0, 2, 3, 1)
    decoded = jax.jit(lambda p, x: network.apply(p, x, method="decode"))(parameters, latents)
    yield "decoded", decoded, model.decode(_torch(latents, 0, 3, 1, 2)).sample.numpy().transpose(0, 2, 3, 1)


def _cogvideox_vae(
    model: Any, config: Any, network: Network, parameters: Mapping[str, Any], rng: np.random.Generator
) -> Outputs:
    side = 2 * config.downsampling
    # Two chunks of frames in each direction.
    clip = _normal(rng, 1, 17, side, side, config.channels)
    latents = _normal(rng, 1, 5, 2, 2, config.latent_channels)
    moments = jax.jit(lambda p, x: network.apply(p, x, method="encode"))(parameters, clip)
    theirs = model.encode(_torch(clip, 0, 4, 1, 2, 3)).latent_dist.parameters
    yield "moments", moments, theirs.numpy().transpose(0, 2, 3, 4, 1)
    decoded = jax.jit(lambda p, x: network.apply(p, x, method="decode"))(parameters, latents)
    theirs = model.decode(_torch(latents, 0, 4, 1, 2, 3)).sample
    yield "decoded", decoded, theirs.numpy().transpose(0, 2, 3, 4, 1)


def _video_dit(
    model: Any, config: Any, network: Network, parameters: Mapping[str, Any], rng: np.random.Generator
) -> Outputs:
    from diffusers import CogVideoXPipeline

    if config.aggregation is not None:
        # diffusers' class has no gates between layers, so the network is compared without them.
        config = config.replace(aggregation=None)
        network = format_of(config).network(config)
        parameters = {name: value for name, value in parameters.items() if name != "aggregation"}
    temporal = config.temporal_patch or 1
    frames, height, width = config.sample_frames, config.sample_height, config.sample_width
    if config.positions.value != "rotary_and_learned":
        # Learned positions have a fixed size; otherwise a small clip is enough.
        frames, height, width = 2 * temporal, min(height, 4 * config.patch), min(width, 6 * config.patch)
    latents = _normal(rng, 2, frames, height, width, config.in_channels)
    text = _normal(rng, 2, config.text_length, config.text_width)
    timesteps = np.array([7.0, 993.0], np.float32)
    offsets = None if config.offset_width is None else np.array([2.0, 2.0], np.float32)
    rotary = None
    if model.config.use_rotary_positional_embeddings:
        pipeline = SimpleNamespace(transformer=model, vae_scale_factor_spatial=8)
        rotary = CogVideoXPipeline._prepare_rotary_positional_embeddings(pipeline, 8 * height, 8 * width, frames, "cpu")
    denoise = jax.jit(lambda p, x, c, t, o: network.apply(p, x, c, t, offsets=o))
    ours = denoise(parameters, latents, text, timesteps, offsets)
    theirs = model(
        hidden_states=_torch(latents, 0, 1, 4, 2, 3),
        encoder_hidden_states=_torch(text),
        timestep=_torch(timesteps),
        ofs=None if offsets is None else _torch(offsets),
        image_rotary_emb=rotary,
        return_dict=False,
    )[0]
    yield "prediction", ours, theirs.numpy().transpose(0, 1, 3, 4, 2)


def _t5(model: Any, config: Any, network: Network, parameters: Mapping[str, Any], rng: np.random.Generator) -> Outputs:
    tokens = rng.integers(0, config.vocabulary, (2, 24)).astype(np.int32)
    ours = jax.jit(network.apply)(parameters, tokens)
    yield "embeddings", ours, model(input_ids=_torch(tokens.astype(np.int64))).last_hidden_state.numpy()


def _dinov2(
    model: Any, config: Any, network: Network, parameters: Mapping[str, Any], rng: np.random.Generator
) -> Outputs:
    """Tokens of images of the positions' size, and of another one."""
    side, patch = config.positions * config.patch, config.patch
    for name, size in (("tokens", (side, side)), ("tokens of another size", (side + patch, side + 2 * patch))):
        images = _normal(rng, 2, *size, 3)
        theirs = model(pixel_values=_torch(images, 0, 3, 1, 2)).last_hidden_state
        yield name, jax.jit(network.apply)(parameters, images), theirs.numpy()


def _llama(
    model: Any, config: Any, network: Network, parameters: Mapping[str, Any], rng: np.random.Generator
) -> Outputs:
    """Logits of sequences; with heads, with actions added to the embeddings, and rewards."""
    from jvgen.models.ivideogpt.layout import Layout

    sizes = {"context_tokens": 5, "future_tokens": 3, "context_codes": 0, "future_codes": config.vocabulary - 2}
    layout = Layout(context_frames=1, future_frames=2, **sizes)
    tokens = rng.integers(0, config.vocabulary, (2, layout.length)).astype(np.int32)
    actions = _normal(rng, 2, layout.future_frames, config.action_width) if config.action_width else None

    def run(parameters: Any, tokens: Any, actions: Any) -> Any:
        bound = network.bind(parameters)
        hidden = bound(tokens, layout, actions)
        rewards = bound.rewards(hidden[:, layout.reward_positions]) if config.reward else None
        return bound.logits(hidden), rewards

    logits, rewards = jax.jit(run)(parameters, tokens, actions)
    embedded = model.model.embed_tokens(_torch(tokens.astype(np.int64)))
    if actions is not None:
        added = _torch(actions) @ model.heads["action_linear.weight"].T + model.heads["action_linear.bias"]
        embedded[:, layout.future_slots] += added
    theirs = model(inputs_embeds=embedded, output_hidden_states=True)
    yield "logits", logits, theirs.logits.numpy()
    if config.reward:
        last = theirs.hidden_states[-1][:, layout.reward_positions]
        wanted = last @ model.heads["reward_linear.weight"].T + model.heads["reward_linear.bias"]
        yield "rewards", rewards, wanted[..., 0].numpy()


Comparison = Callable[[Any, Any, Network, Mapping[str, Any], np.random.Generator], Outputs]
_COMPARISONS: dict[str, Comparison] = {
    "AutoencoderKL": _image_vae,
    "AutoencoderKLCogVideoX": _cogvideox_vae,
    "CogVideoXTransformer3DModel": _video_dit,
    "T5EncoderModel": _t5,
    "Dinov2Model": _dinov2,
    "LlamaForCausalLM": _llama,
}
