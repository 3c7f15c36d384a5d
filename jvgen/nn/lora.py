"""LoRA (Hu et al. 2021, arXiv 2106.09685): two narrow matrices beside the kernel of a linear layer.

The network itself is unchanged. Its factors are parameters of their own, which are put beside the layers of the network
when it runs (`attach`), or added to its kernels (`merge`). For the layer at "blocks/layers/attention/query" they are
"blocks/layers/attention/query/down" and ".../up", with a leading axis of layers where the kernel has one.

In the parameters of a task the factors for all its networks are under `TREE`: "lora/denoiser/blocks/...". Networks of a
task that may have a LoRA run through `bind`, or by parameters that `whole` returns.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from jvgen import nested
from jvgen.config import Config, ConfigError
from jvgen.nn.dropout import dropout, folded
from jvgen.nn.linear import Linear
from jvgen.nn.network import Network, Parameters
from jvgen.parallel import axes
from jvgen.parallel.axes import LAYERS, Axes
from jvgen.precision import product_precision
from jvgen.value_rules import BelowOne, Count, Pattern, Positive

DOWN, UP = "down", "up"
# Name of the factors among the networks of a task.
TREE = "lora"
# How many paths a message lists.
MAX_LISTED = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig(Config):
    """Which linear layers get a LoRA, and of what size. Nothing else of the network is trained.

    Attributes:
      rank: width between the two factors.
      alpha: the update is alpha / rank times the product of the factors; none for alpha = rank.
      targets: patterns of linear layers by path, matched from the start: "denoiser/blocks/layers/attention/query". Of
        networks besides the task's first one, those are chosen by patterns with the network's name in them:
        "text_encoder/", and not ".*/query".
      dropout: share of the layers' inputs that is set to zero on the way to the factors, in training.
    """

    rank: Count = 64
    alpha: Positive | None = None
    targets: tuple[Pattern, ...] = (r"denoiser/blocks/layers/attention/(query|key|value|output)$",)
    dropout: BelowOne = 0.0

    @property
    def scale(self) -> float:
        """Factor on the product of the factors."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class Lora(nnx.Module):
    """The two factors of an update of one matrix (or of one in each layer of a stack), which is zero at first.

    Args:
      features_in, features_out: of the linear layer.
      rank: width between the factors.
      axes: logical names of the kernel's axes, without that of layers.
      layers: number of stacked layers; None for a single one.
    """

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        rank: int,
        axes: Axes,
        layers: int | None = None,
        rngs: nnx.Rngs,
    ):
        stack, names = ((), ()) if layers is None else ((layers,), (LAYERS,))
        down = nnx.initializers.normal(1.0 / rank)(rngs.params(), (*stack, features_in, rank), jnp.float32)
        self.down = nnx.Param(down, logical_axes=(*names, axes[0], None))
        self.up = nnx.Param(jnp.zeros((*stack, rank, features_out), jnp.float32), logical_axes=(*names, None, axes[1]))


class Factors(nnx.Module):
    """A `Lora` for each of some layers, at the layers' own paths.

    Args:
      layers: path of each layer -> its kernel (anything with `.shape`) and the logical names of the kernel's axes.
      rank: of all.
    """

    def __init__(self, layers: Mapping[str, tuple[jax.ShapeDtypeStruct, Axes]], *, rank: int, rngs: nnx.Rngs):
        for path, (kernel, names) in layers.items():
            node = self
            *parents, name = path.split("/")
            for part in parents:
                if not hasattr(node, part):
                    setattr(node, part, _Branch())
                node = getattr(node, part)
            count = kernel.shape[0] if LAYERS in names else None
            lora = Lora(*kernel.shape[-2:], rank=rank, axes=names[-2:], layers=count, rngs=rngs)
            setattr(node, name, lora)


class _Branch(nnx.Module):
    """A part of a path."""


class _Attached(nnx.Module):
    """Factors beside a layer, in the network that runs; `Linear` adds what it returns."""

    def __init__(
        self,
        down: jax.Array,
        up: jax.Array,
        names: tuple[Axes, Axes],
        keys: jax.Array | None,
        rate: float,
        before: "_Attached | None",
    ):
        self.down, self.up = nnx.Param(down, logical_axes=names[0]), nnx.Param(up, logical_axes=names[1])
        self.rate, self.before = rate, before
        stack = names[0][:-2]
        self.keys = None if keys is None else nnx.Variable(keys, logical_axes=(*stack, axes.BATCH, None))

    def __call__(self, inputs: jax.Array) -> jax.Array:
        x = inputs
        if self.keys is not None:
            x = dropout(x, jax.random.wrap_key_data(self.keys[...]), self.rate)
        for factor in (self.down, self.up):
            kernel = factor[...].astype(x.dtype)
            x = jnp.matmul(x, kernel, precision=product_precision(x.dtype))
        return x if self.before is None else self.before(inputs) + x


def linear_layers(network: Network) -> dict[str, tuple[jax.ShapeDtypeStruct, Axes]]:
    """The linear layers of a network: path -> kernel and the logical names of its axes."""
    module = nnx.merge(network.graph, network.state)
    shapes, names = nested.flatten(network.shapes), nested.flatten(network.axes)
    found = {}
    for path, node in nnx.iter_graph(module):
        if isinstance(node, Linear):
            name = "/".join(str(part) for part in path)
            found[name] = (shapes[f"{name}/kernel"], names[f"{name}/kernel"])
    return dict(sorted(found.items()))


def targets(
    config: LoraConfig,
    networks: Mapping[str, Network],
    refused: Mapping[str, str] | None = None,
    field: str = "task.lora",
) -> dict[str, tuple[jax.ShapeDtypeStruct, Axes]]:
    """The layers that a config chooses: path with the name of the network -> kernel and names of its axes.

    Args:
      networks: by name, those that may get a LoRA. Layers of the first one need not be chosen by its name.
      refused: other networks of the task, with the reason why they may not.
      field: where the config is, for messages.

    Raises:
      ConfigError: a pattern that chooses no layer, or layers of a network that may not get one.
    """
    layers = {
        f"{name}/{path}": found for name, network in networks.items() for path, found in linear_layers(network).items()
    }
    chosen: dict[str, tuple[jax.ShapeDtypeStruct, Axes]] = {}
    for pattern in config.targets:
        # In earlier versions there was one network: what a pattern chose then, it chooses today.
        named = [name for number, name in enumerate(networks) if not number or name in pattern]
        matching = {path: found for path, found in layers.items() if path.split("/")[0] in named}
        matching = {path: found for path, found in matching.items() if re.match(pattern, path)}
        if not matching:
            raise ConfigError(f"{field}.targets: {_without_effect(pattern, layers, networks, refused or {})}")
        chosen |= matching
    if not chosen:
        raise ConfigError(f"{field}.targets is empty: name linear layers, such as {', '.join(list(layers)[:3])}.")
    return dict(sorted(chosen.items()))


def _without_effect(
    pattern: str, layers: Mapping[str, Any], networks: Mapping[str, Network], refused: Mapping[str, str]
) -> str:
    """What is wrong with a pattern that chooses no layer."""
    name, those = re.match(r"\w*", pattern)[0], " and ".join(networks)
    if name in refused:
        return f"{pattern!r} is in {name}, {refused[name]}; layers with a LoRA are those of {those}."
    near = difflib.get_close_matches(pattern, layers, n=MAX_LISTED, cutoff=0.0)
    return (
        f"{pattern!r} matches no linear layer of {those} (it is matched from the start of the path, which is the "
        f"network's name). The nearest are {', '.join(near)}."
    )


def pairs(factors: Parameters) -> dict[str, Parameters]:
    """Path of each layer -> its {"down": ..., "up": ...}."""
    flat = nested.flatten(factors)
    paths = sorted({path.rpartition("/")[0] for path in flat})
    return {path: {part: flat[f"{path}/{part}"] for part in (DOWN, UP)} for path in paths}


def attach(
    module: nnx.Module,
    factors: Parameters,
    scale: float = 1.0,
    *,
    rate: float = 0.0,
    keys: jax.Array | None = None,
) -> None:
    """Put factors beside the linear layers of a network that is about to run (`Network.bind`).

    They add to what is there already. Gradients of the factors take no products with the size of a kernel.

    Args:
      factors: as `Factors` has them; layers may differ in rank.
      scale: factor on the updates.
      rate, keys: dropout of the layers' inputs, with one key per sample, `B`; no dropout without keys.
    """
    for number, (path, pair) in enumerate(pairs(factors).items()):
        layer = module
        for part in path.split("/"):
            layer = layer[int(part)] if part.isdecimal() else getattr(layer, part)
        assert isinstance(layer, Linear), f"{path} is no linear layer"
        names = layer.kernel.get_metadata()["logical_axes"]
        stack, (rows, columns) = names[:-2], names[-2:]
        own = folded(keys, number)
        if own is not None and stack:
            own = jax.vmap(lambda layer, keys=own: folded(keys, layer))(jnp.arange(pair[DOWN].shape[0]))
        layer.lora = _Attached(
            pair[DOWN],
            _scaled(pair[UP], scale),
            ((*stack, rows, None), (*stack, None, columns)),
            None if own is None else jax.random.key_data(own),
            rate,
            layer.lora,
        )


def _scaled(factor: ArrayLike, scale: float) -> jax.Array:
    """`scale * factor`, rounded once, as `merge` has it: 2 / 3 in bfloat16 is 0.2% too large."""
    factor = jnp.asarray(factor)
    return (factor.astype(jnp.float32) * scale).astype(factor.dtype)


def apply(
    network: Network,
    parameters: Parameters,
    factors: Parameters | None,
    *args: Any,
    scale: float = 1.0,
    rate: float = 0.0,
    keys: jax.Array | None = None,
    **options: Any,
) -> Any:
    """`Network.apply` with factors beside some layers, see `attach`; without factors the network alone."""
    module = network.bind(parameters)
    if factors is not None:
        attach(module, factors, scale, rate=rate, keys=keys)
    return module(*args, **options)


def bind(
    network: Network,
    name: str,
    parameters: Parameters,
    config: LoraConfig | None,
    keys: jax.Array | None = None,
) -> Any:
    """A network of a task with its parameters, and its LoRA beside its layers; for calls in a traced function.

    Args:
      name: of the network.
      parameters: of the task's networks by name, trained or not, and of a LoRA, if any, as `TREE`.
      config: of the task; None where the adapters are those of other runs, which have their scales in them.
      keys: dropout of the layers' inputs, with one key per sample, `B`; no dropout without keys.
    """
    module, factors = network.bind(parameters[name]), parameters.get(TREE, {}).get(name)
    if factors is not None:
        config = config or LoraConfig()
        attach(module, factors, config.scale, rate=config.dropout, keys=keys)
    return module


def whole(name: str, parameters: Parameters, config: LoraConfig | None) -> Parameters:
    """The parameters of a network of a task with its LoRA merged into them, if it has one; arguments as in `bind`."""
    factors = parameters.get(TREE, {}).get(name)
    if factors is None:
        return parameters[name]
    return merge(parameters[name], factors, (config or LoraConfig()).scale)


def merge(parameters: Parameters, factors: Parameters, scale: float = 1.0) -> Parameters:
    """Parameters of a network with `scale` times the updates added to its kernels."""
    flat = nested.flatten(parameters)
    for path, pair in pairs(factors).items():
        flat[f"{path}/kernel"] = merged_kernel(flat[f"{path}/kernel"], pair[DOWN], pair[UP], scale)
    return nested.unflatten(flat)


def merged_kernel(kernel: ArrayLike, down: ArrayLike, up: ArrayLike, scale: float = 1.0) -> jax.Array:
    """One kernel (or stack) with its update, added in float32 and rounded once."""
    kernel = jnp.asarray(kernel)
    down, up = (jnp.asarray(factor, jnp.float32) for factor in (down, up))
    update = jnp.einsum("...ir,...ro->...io", down, up, precision=product_precision(down.dtype))
    return (kernel.astype(jnp.float32) + scale * update).astype(kernel.dtype)


def combined(adapters: Sequence[tuple[Parameters, float]]) -> Parameters:
    """Several adapters with a scale each as one of scale 1: its updates are the sum of theirs."""
    together: dict[str, dict[str, list[jax.Array]]] = {}
    for factors, scale in adapters:
        for path, pair in pairs(factors).items():
            lists = together.setdefault(path, {DOWN: [], UP: []})
            lists[DOWN].append(pair[DOWN])
            lists[UP].append(_scaled(pair[UP], scale))
    return nested.unflatten(
        {
            f"{path}/{part}": jnp.concatenate(lists[part], axis=-1 if part == DOWN else -2)
            for path, lists in together.items()
            for part in (DOWN, UP)
        }
    )
