"""Dispatcher of attention: chooses one of several kernels, and runs it on each device of a mesh.

On a mesh, tokens are sharded over `seq` (`jvgen.nn.sequence_parallel` has three ways) and heads over `tensor`.
"""

import contextlib
import contextvars
import dataclasses
import enum
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jvgen.config import ConfigError
from jvgen.kernels.attention import chunked, cpu, flash_tpu, gpu, reference, tokamax_splash, tpu
from jvgen.nn import kernel_report, sequence_parallel
from jvgen.nn.kernel_report import Call
from jvgen.nn.sequence_parallel import SequenceParallel, Way
from jvgen.nn.stacked import ATTENTION_OUTPUT
from jvgen.parallel import axes


class AttentionKernel(enum.Enum):
    """Implementations of attention; all give the same numbers up to rounding."""

    AUTO = "auto"  # chosen by backend, lengths and dtype: see `choose`
    REFERENCE = "reference"  # all scores at once, float32: the oracle; the only one that has a bias on every backend
    CHUNKED = "chunked"  # blocks of scores, on any backend
    CPU = "cpu"  # one head at a time, float32
    GPU = "gpu"  # cuDNN
    TPU = "tpu"  # Pallas splash attention of JAX
    FLASH_TPU = "flash_tpu"  # Pallas kernels of this project, which can go around a ring
    TOKAMAX = "tokamax"  # splash attention of the package tokamax, for TPUs; AUTO never takes it
    TOKAMAX_FIXED = "tokamax_fixed"  # the same with a fixed maximum: for networks that normalize queries and keys


@dataclasses.dataclass(frozen=True)
class Choice:
    """A kernel and why it was chosen."""

    kernel: AttentionKernel
    reason: str


# Kernels that would be interpreted, or fail to compile, elsewhere.
_MADE_FOR = {
    AttentionKernel.GPU: "gpu",
    AttentionKernel.TPU: "tpu",
    AttentionKernel.FLASH_TPU: "tpu",
    AttentionKernel.TOKAMAX: "tpu",
    AttentionKernel.TOKAMAX_FIXED: "tpu",
}
# With fewer keys than this, one fused softmax over all scores is faster than a loop over blocks.
SHORT_LENGTH = 512


def choose(
    platform: str,
    *,
    dtype: jnp.dtype,
    query_length: int,
    key_length: int,
    bias: bool = False,
    gpu_refusal: str = "",
    flash_refusal: str = "",
) -> Choice:
    """The kernel that AUTO stands for.

    Args:
      platform: "cpu", "gpu" or "tpu": of the devices that run the program.
      dtype: of query, key and value.
      query_length, key_length: tokens.
      bias: whether there is a bias on the scores.
      gpu_refusal: why the GPUs' own kernel cannot take these arrays, see `jvgen.kernels.attention.gpu.refusal`.
      flash_refusal: why this project's kernels for TPUs are not taken, see `refusal` and `slower` of
        `jvgen.kernels.attention.flash_tpu`.
    """
    name = jnp.dtype(dtype).name
    short = key_length < SHORT_LENGTH and query_length <= 4 * SHORT_LENGTH
    if bias:
        return Choice(AttentionKernel.REFERENCE, "a bias on the scores, which no other kernel takes on all backends")
    if platform == "cpu":
        return Choice(AttentionKernel.CPU, "CPU devices")
    if platform == "tpu":
        if short:
            return Choice(AttentionKernel.REFERENCE, f"TPU devices, fewer than {SHORT_LENGTH} keys")
        if name != "bfloat16":
            return Choice(AttentionKernel.CHUNKED, "TPU devices; flash_tpu and tpu refused: they multiply in bfloat16")
        if flash_refusal:
            return Choice(AttentionKernel.TPU, f"TPU devices; flash_tpu refused: {flash_refusal}")
        return Choice(AttentionKernel.FLASH_TPU, "TPU devices")
    if not gpu_refusal:
        return Choice(AttentionKernel.GPU, "CUDA devices")
    if short:
        return Choice(AttentionKernel.REFERENCE, f"fewer than {SHORT_LENGTH} keys; gpu refused: {gpu_refusal}")
    return Choice(AttentionKernel.CHUNKED, f"{platform} devices; gpu refused: {gpu_refusal}")


_instead: contextvars.ContextVar[AttentionKernel] = contextvars.ContextVar("attention", default=AttentionKernel.AUTO)


@contextlib.contextmanager
def automatic(kernel: AttentionKernel) -> Iterator[None]:
    """Within this context AUTO takes this kernel where it would take one that is made for TPUs or GPUs.

    It reaches networks that have no field for a kernel. Calls that no such kernel computes (a bias on the scores, few
    keys, float32 on TPUs, CPUs) stay as they are. With AUTO it changes nothing.
    """
    token = _instead.set(kernel)
    try:
        yield
    finally:
        _instead.reset(token)


def attention(
    query: Float[Array, "B L N D"],
    key: Float[Array, "B K N D"],
    value: Float[Array, "B K N D"],
    *,
    scale: float | None = None,
    valid_length: int | None = None,
    causal: bool = False,
    bias: Float[Array, "#B #N #L #K"] | None = None,
    kernel: AttentionKernel = AttentionKernel.AUTO,
    sequence: SequenceParallel = SequenceParallel.AUTO,
) -> Float[Array, "B L N D"]:
    """softmax(scale * query key^T + bias) value, over the keys before `valid_length`.

    Args:
      query: L tokens of N heads.
      key, value: K tokens of N heads.
      scale: factor on the scores; default 1 / sqrt(D).
      valid_length: number of keys that are not padding, known at trace time; later keys have no weight. Rows of the
        result for padded queries are finite and meaningless.
      causal: query i attends to keys 0..i only; needs as many queries as keys, and tokens that are not sharded.
      bias: added to the scaled scores.
      kernel: the implementation; AUTO chooses one. The choice is in the report of `jvgen.nn.kernel_report`.
      sequence: how devices attend that share the tokens; AUTO chooses, and the report has it.

    Returns:
      `B L N D` in the dtype of `query`. The softmax is float32 in every kernel.

    Raises:
      ValueError: `valid_length` outside 1..K, a bias with a kernel that has none, or lengths or sharding that `causal`
        does not support.
      ConfigError: a kernel that does not run on these devices or for these arrays, or is not installed; a `sequence`
        that this kernel or these arrays do not have.
    """
    width, key_length = query.shape[-1], key.shape[1]
    scale = width**-0.5 if scale is None else float(scale)
    if valid_length is not None and not 1 <= valid_length <= key_length:
        raise ValueError(f"valid_length = {valid_length}: must lie in 1..{key_length}, the number of keys.")
    if valid_length == key_length:
        valid_length = None
    partitioner = axes.current()
    if causal:
        _check_causal(query, key, valid_length, partitioner)
    choice = _choice(kernel, query, key, bias is not None, causal)
    kernel = choice.kernel
    keys = f"{key_length} keys" if valid_length is None else f"{valid_length} of {key_length} keys"
    keys += " before each query" * causal + " with a bias" * (bias is not None)
    place = _place(partitioner, query, key, bias)
    way = None if place is None else _way(sequence, kernel, place, query, key, bias is not None)
    reason = choice.reason if way is None else f"{choice.reason}; {place.shown}: {way.way.value}, {way.reason}"
    valid = key_length if valid_length is None else valid_length
    call = Call(
        "attention", kernel.value, query.dtype.name, width, query.shape[1], key_length, valid, scale, causal=causal
    )
    kernel_report.note(query.shape, keys, reason, call if place is None else place.on_device(call, way))
    if bias is not None and kernel not in (AttentionKernel.REFERENCE, AttentionKernel.GPU):
        raise ValueError(f"kernel = {kernel.value}: does not support a bias on the scores; use reference, gpu or auto.")
    run = bound(kernel, axes.platform(), scale, valid_length, causal)
    if place is not None:
        if way is not None:
            run = _over_devices(way.way, run, kernel, place, scale, valid)
        output = place.mapped(run)(query, key, value, bias)
    else:
        output = run(query, key, value, bias)
    if kernel is AttentionKernel.REFERENCE or (kernel is AttentionKernel.GPU and axes.platform() == "cpu"):
        # What the other kernels' own backward pass needs is known to remat policies: a name would store a second copy.
        output = checkpoint_name(output, ATTENTION_OUTPUT)
    return output


def check_platform(field: str, kernel: str, made_for: str, platform: str) -> None:
    """Raise `ConfigError` for a kernel of GPUs on TPUs or the reverse; on CPUs their kernels are run as they can be."""
    if platform not in ("cpu", made_for):
        raise ConfigError(f"{field} = {kernel}: it runs on {made_for.upper()}s, not on {platform.upper()}s; use auto.")


def _choice(kernel: AttentionKernel, query: jax.Array, key: jax.Array, bias: bool, causal: bool) -> Choice:
    """The kernel that runs, and why."""
    platform, refused = axes.platform(), ""
    if kernel in _MADE_FOR:
        check_platform("attention", kernel.value, _MADE_FOR[kernel], platform)
    if platform not in ("cpu", "tpu") and kernel in (AttentionKernel.AUTO, AttentionKernel.GPU):
        refused = gpu.refusal(axes.device(), query.shape, key.shape[1], query.dtype, causal=causal, bias=bias)
    kind = axes.device().device_kind
    flash_refused = flash_tpu.refusal(kind)
    if kernel is AttentionKernel.AUTO:
        flash_refused = flash_refused or flash_tpu.slower(kind, query.shape[3])
        options = {"query_length": query.shape[1], "key_length": key.shape[1], "bias": bias}
        chosen = choose(platform, dtype=query.dtype, **options, gpu_refusal=refused, flash_refusal=flash_refused)
        instead = _instead.get()
        if instead in (AttentionKernel.AUTO, chosen.kernel) or chosen.kernel not in _MADE_FOR:
            return chosen
        return dataclasses.replace(
            _choice(instead, query, key, bias, causal), reason=f"training.attention, not {chosen.kernel.value}"
        )
    if kernel is AttentionKernel.GPU and refused:
        raise ConfigError(f"attention = gpu: {refused}; use auto or chunked.")
    if kernel is AttentionKernel.FLASH_TPU and flash_refused:
        raise ConfigError(f"attention = flash_tpu: {flash_refused}; use auto.")
    if kernel in (AttentionKernel.TOKAMAX, AttentionKernel.TOKAMAX_FIXED):
        tokamax_splash.splash()
    return Choice(kernel, "as configured")


Run = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]


def bound(kernel: AttentionKernel, platform: str, scale: float, valid_length: int | None, causal: bool) -> Run:
    """The kernel as a function of queries, keys, values and a bias, for the arrays of one device."""
    options = {"scale": scale, "valid_length": valid_length, "causal": causal}
    if kernel is AttentionKernel.REFERENCE:
        return lambda q, k, v, bias: reference.attention(q, k, v, bias=bias, **options)
    if kernel is AttentionKernel.GPU:
        implementation = "xla" if platform == "cpu" else "cudnn"
        return lambda q, k, v, bias: gpu.attention(q, k, v, bias=bias, implementation=implementation, **options)
    options["residual_name"] = ATTENTION_OUTPUT
    modules = {
        AttentionKernel.CHUNKED: chunked,
        AttentionKernel.CPU: cpu,
        AttentionKernel.TPU: tpu,
        AttentionKernel.FLASH_TPU: flash_tpu,
        AttentionKernel.TOKAMAX: tokamax_splash,
        AttentionKernel.TOKAMAX_FIXED: tokamax_splash,
    }
    module = modules[kernel]
    if module in (tpu, flash_tpu, tokamax_splash):
        options["interpret"] = platform != "tpu"
    if kernel is AttentionKernel.TOKAMAX_FIXED:
        options["fixed_maximum"] = True
    return lambda q, k, v, bias: module.attention(q, k, v, **options)


def _check_causal(
    query: jax.Array, key: jax.Array, valid_length: int | None, partitioner: axes.Partitioner | None
) -> None:
    if valid_length is not None or query.shape[1] != key.shape[1]:
        raise ValueError(
            f"causal attention of {query.shape[1]} queries over {key.shape[1]} keys (valid_length = {valid_length}): "
            "it needs as many queries as keys, all of them valid."
        )
    if partitioner is not None:
        names = (axes.BATCH, axes.LENGTH, axes.ACTIVATION_HEADS, None)
        split = partitioner.activation(names, query.shape).spec[1] or ()
        for axis in (split,) if isinstance(split, str) else split:
            if partitioner.mesh.shape[axis] > 1:
                raise ValueError(
                    f"mesh.{axis} = {partitioner.mesh.shape[axis]}: causal attention cannot shard tokens; set it to 1."
                )


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where the arrays of a call are on a mesh.

    Attributes:
      mesh: of the devices.
      query, key, bias: specs of the arrays; None for no bias.
      split: mesh axes that share the keys, as in a spec; None if every device has all of them.
      devices: along `split`.
      rows: keys per device.
    """

    mesh: jax.sharding.Mesh
    query: PartitionSpec
    key: PartitionSpec
    bias: PartitionSpec | None
    split: sequence_parallel.MeshAxis | None
    devices: int
    rows: int

    @property
    def shown(self) -> str:
        names = (self.split,) if isinstance(self.split, str) else self.split
        return "tokens over " + " x ".join(f"{name}={self.mesh.shape[name]}" for name in names)

    def on_device(self, call: Call, way: Way | None) -> Call:
        """What the kernel computes on one of them, of the call of all."""
        if way is not None and way.way is SequenceParallel.ULYSSES:
            return call
        if way is not None and way.way is SequenceParallel.RING:
            # The device that has the last valid keys.
            last = (call.valid - 1) % self.rows + 1
            return dataclasses.replace(call, queries=self.rows, keys=self.rows, valid=last, ring=self.devices)
        split = self.query[1] or ()
        devices = math.prod(self.mesh.shape[name] for name in ((split,) if isinstance(split, str) else split))
        return dataclasses.replace(call, queries=call.queries // devices)

    def mapped(self, run: Run) -> Run:
        """A function of the arrays of one device, on every device."""
        places = (self.query, self.key, self.key, self.bias)
        return jax.shard_map(run, mesh=self.mesh, in_specs=places, out_specs=self.query, check_vma=False)


def _place(
    partitioner: axes.Partitioner | None, query: jax.Array, key: jax.Array, bias: jax.Array | None
) -> _Place | None:
    """None on one device."""
    if partitioner is None or partitioner.mesh.size == 1:
        return None
    names = (axes.BATCH, axes.LENGTH, axes.ACTIVATION_HEADS, None)
    query_spec = partitioner.activation(names, query.shape).spec
    key_spec = partitioner.activation(names, key.shape).spec
    bias_spec = None
    if bias is not None:
        by_dimension = (query_spec[0], query_spec[2], query_spec[1], None)
        bias_spec = PartitionSpec(*(None if n == 1 else s for n, s in zip(bias.shape, by_dimension, strict=True)))
    split = key_spec[1]
    names = (split,) if isinstance(split, str) else split or ()
    devices = math.prod(partitioner.mesh.shape[name] for name in names)
    return _Place(partitioner.mesh, query_spec, key_spec, bias_spec, split, devices, key.shape[1] // devices)


# Kernels that can attend to some keys at a time.
_IN_PARTS = (AttentionKernel.FLASH_TPU, AttentionKernel.CHUNKED)


def _way(
    sequence: SequenceParallel, kernel: AttentionKernel, place: _Place, query: jax.Array, key: jax.Array, bias: bool
) -> Way | None:
    """How devices that share keys attend to all of them; None where none do."""
    if place.devices == 1:
        return None
    ring = kernel in _IN_PARTS
    refused = ""
    if bias:
        refused = "a bias on the scores"
    elif place.query[1] != place.key[1] or query.shape[1] != key.shape[1]:
        refused = "other queries than keys"
    elif sequence is SequenceParallel.RING and not ring:
        refused = f"kernel {kernel.value}, which attends to all keys at once"
    if refused and sequence in (SequenceParallel.ULYSSES, SequenceParallel.RING):
        raise ConfigError(f"sequence_parallel = {sequence.value}: not with {refused}; use auto or gather.")
    if refused:
        return Way(SequenceParallel.GATHER, refused)
    if sequence is not SequenceParallel.AUTO:
        return Way(sequence, "as configured")
    heads = place.query[2] or ()
    tensor = math.prod(place.mesh.shape[name] for name in ((heads,) if isinstance(heads, str) else heads))
    sizes = {"devices": place.devices, "tokens": place.rows, "heads": query.shape[2] // tensor}
    return sequence_parallel.choose(axes.platform(), **sizes, ring=ring)


def _over_devices(
    way: SequenceParallel, run: Run, kernel: AttentionKernel, place: _Place, scale: float, valid: int
) -> Run:
    """`run`, which needs all keys, on arrays that have those of one device."""
    split, interpret = place.split, axes.platform() != "tpu"

    def local(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None) -> jax.Array:
        if way is SequenceParallel.ULYSSES:
            return sequence_parallel.by_heads(lambda *arrays: run(*arrays, None), split, query, key, value)
        if way is SequenceParallel.RING:
            parts = chunked.Parts(scale)
            if kernel is AttentionKernel.FLASH_TPU:
                parts = flash_tpu.Parts.of(query.shape[1], query.shape[3], scale, interpret)
            return sequence_parallel.ring(parts, split, valid, ATTENTION_OUTPUT, query, key, value)
        key, value = (sequence_parallel.gathered(array, split) for array in (key, value))
        return run(query, key, value, bias)

    return local
