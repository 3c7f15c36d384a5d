"""Runs the kernels that a program has chosen on a device of this process, before they decide a run's numbers.

Kernels for accelerators are tested by compiling and interpreting them; whether a chip computes with them what they say
is seen on that chip. Each is run at the lengths, dtype, head width and padding of its call, with two heads of one batch
entry, forward and backward, beside attention in blocks that multiplies in float32. Keys of a ring go around those of
its devices that this process has.
"""

import dataclasses
import functools
import math
import threading
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jvgen import exit_codes
from jvgen.geometry.epipolar import Band, token_points
from jvgen.kernels.attention import chunked, flash_tpu
from jvgen.kernels.epipolar_attention import chunked as epipolar_chunked
from jvgen.nn import epipolar_attention, sequence_parallel
from jvgen.nn.attention import AttentionKernel, bound
from jvgen.nn.epipolar_attention import EpipolarKernel
from jvgen.nn.kernel_report import Call
from jvgen.parallel import axes

# Root mean square of the difference, as a share of that of the exact array: over all tokens, and of any one.
BOUND, TOKEN_BOUND = 0.02, 0.05
# Smaller arrays (root mean square) are compared with this: gradients of queries and keys are zero with a single key.
LEAST = 1e-3
HEADS = 2
# Of values of padded keys, so that a kernel that does not mask one of many is far off.
PADDING = 32.0
NAMES = ("output", "gradient of queries", "gradient of keys", "gradient of values")
# Kernels for accelerators, and what to set where one is wrong.
_INSTEAD = {
    "flash_tpu": "tpu",
    "tpu": "chunked",
    "gpu": "chunked",
    "tokamax": "tpu",
    "tokamax_fixed": "tpu",
}


class KernelDiffers(RuntimeError):
    """A kernel computes something else on a device than it should; no step ran with it."""

    exit_code = exit_codes.USER_ERROR


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far one array of a kernel is from the exact one: over all tokens, and of the token that is farthest."""

    name: str
    overall: float
    token: float

    @property
    def fine(self) -> bool:
        """Whether it is within the bounds; not with NaN."""
        return self.overall <= BOUND and self.token <= TOKEN_BOUND


def is_checked(call: Call, platform: str) -> bool:
    """Whether a call takes a kernel that only devices like these run."""
    return platform != "cpu" and call.kernel in _INSTEAD


def verify(call: Call, log: Callable[[str], None]) -> None:
    """Run the kernel of a call on this process's first device, once per kind of call, and log how near it is.

    Nothing is done on CPUs, for kernels that are plain JAX, and while a program is traced for a described pod. It takes
    seconds, most of them to compile. What keeps the kernel from running alone (memory, the compiler) is logged: it says
    nothing against the program's own numbers.

    Raises:
      KernelDiffers: an output or a gradient is out of bounds, or not finite.
    """
    device = jax.local_devices()[0]
    if call in _verified or not is_checked(call, device.platform) or axes.device() not in jax.devices():
        return
    try:
        log(measured(call, device))
    except KernelDiffers:
        raise
    except Exception as error:
        log(f"WARNING: not checked before the first step: {not_run(call, device, error)}")
    _verified.add(call)


def measured(call: Call, device: jax.Device) -> str:
    """Run the kernel of a call on a device; a line that says how near it is.

    Raises:
      KernelDiffers: see `verify`.
      Exception: what compiling or running it raises.
    """
    start = time.perf_counter()
    found = _elsewhere(lambda: differences(call, device))
    judge(call, device.device_kind, found)
    shown = ", ".join(f"{one.name} {one.overall:.2%}" for one in found)
    seconds = time.perf_counter() - start
    return f"{call} on {device.device_kind} {device.id}: off float32 by {shown}, {seconds:.1f} s"


def not_run(call: Call, device: jax.Device, error: Exception) -> str:
    """One line about a kernel that did not run."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{call} did not run alone on {device.device_kind} {device.id}: {type(error).__name__}: {first}"


_verified: set[Call] = set()


def judge(call: Call, device_kind: str, found: list[Difference]) -> None:
    """Raise `KernelDiffers` if something is out of bounds."""
    wrong = [one for one in found if not one.fine]
    if wrong:
        instead = f"training.attention={_INSTEAD[call.kernel]} (the network's own field, if it names {call.kernel})"
        if call.operation.startswith("epipolar"):
            instead = "task.denoiser.sync.kernel=chunked in a multi-view config"
        shown = "; ".join(f"{one.name} {one.overall:.2%}, of one token {one.token:.2%}" for one in wrong)
        raise KernelDiffers(
            f"{call}: computes wrong numbers on {device_kind}. Differences from float32: {shown} (at most {BOUND:.0%} "
            f"and {TOKEN_BOUND:.0%}). No step has run with it. Take another kernel, --set {instead}, and report "
            "this line."
        )


def _elsewhere(function: Callable[[], list[Difference]]) -> list[Difference]:
    """The result of a function on a thread of its own: a caller that is tracing would trace it."""
    done: list = []

    def work() -> None:
        try:
            done.append(function())
        except BaseException as error:
            done.append(error)

    thread = threading.Thread(target=work, name="kernel-check")
    thread.start()
    thread.join()
    if isinstance(done[0], BaseException):
        raise done[0]
    return done[0]


def differences(call: Call, device: jax.Device) -> list[Difference]:
    """Of the output and the gradients of queries, keys and values."""
    devices = _ring_devices(call, device)
    call, dtype = _of_all(call, len(devices)), jnp.dtype(call.dtype)
    arrays = _arrays(call)
    if call.operation.startswith("epipolar"):
        band = _band(call)
        run = epipolar_attention.bound(EpipolarKernel(call.kernel), call.scale, device.platform)
        exact = functools.partial(epipolar_chunked.attention, scale=call.scale)
        ours = functools.partial(_passes, lambda *qkv: run(*qkv, *band))
        theirs = functools.partial(_passes, lambda *qkv: exact(*qkv, *band))
    else:
        options = {"scale": call.scale, "valid_length": call.valid, "causal": call.causal}
        ours = functools.partial(_passes, _kernel(call, devices))
        theirs = functools.partial(_passes, functools.partial(chunked.attention, **options))
    with jax.default_device(device):
        got = jax.jit(ours)(*(jnp.asarray(array, dtype) for array in arrays))
        # What the kernel was given, not what was drawn.
        want = jax.jit(theirs)(*(jnp.asarray(array, dtype).astype(jnp.float32) for array in arrays))
        return [
            _difference(name, *pair, valid)
            for name, *pair, valid in zip(
                NAMES, got, want, (call.queries, call.queries, *[call.valid] * 2), strict=True
            )
        ]


def _passes(attend: Callable, query: jax.Array, key: jax.Array, value: jax.Array, gradient: jax.Array) -> tuple:
    output, pull = jax.vjp(attend, query, key, value)
    return output, *pull(gradient.astype(output.dtype))


def _ring_devices(call: Call, device: jax.Device) -> list[jax.Device]:
    """The device, and others of this process up to the ring's number: other processes check on their own."""
    others = [one for one in jax.local_devices(backend=device.platform) if one != device]
    return [device, *others[: call.ring - 1]]


def _of_all(call: Call, devices: int) -> Call:
    """The call of a ring of so many devices, of which the last one has the padding, with the lengths of all."""
    before = (devices - 1) * call.keys
    return dataclasses.replace(call, queries=devices * call.queries, keys=before + call.keys, valid=before + call.valid)


def _kernel(call: Call, devices: list[jax.Device]) -> Callable:
    """Of a call with the lengths of all devices."""
    kernel, platform = AttentionKernel(call.kernel), devices[0].platform
    if call.ring == 1:
        run = bound(kernel, platform, call.scale, call.valid, call.causal)
        return lambda query, key, value: run(query, key, value, None)
    rows = call.queries // len(devices)
    parts = flash_tpu.Parts.of(rows, call.width, call.scale, platform != "tpu")
    around = functools.partial(sequence_parallel.ring, parts, "ring", call.valid, "checked")
    spec = PartitionSpec(None, "ring")
    mesh = Mesh(np.array(devices), ("ring",))
    return jax.shard_map(around, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)


def _arrays(call: Call) -> list[np.ndarray]:
    """Queries, keys, values and the gradient of the output, float32 `1 L N D`.

    The first head's scores are bounded by the norms of its queries and keys. The second has one long key that no query
    looks along, so that its scores are alike and kernels that bound scores by norms cannot.
    """
    random = np.random.default_rng(0)
    lengths = (call.queries, call.keys, call.keys, call.queries)
    query, key, value, gradient = (
        random.standard_normal((1, length, HEADS, call.width), np.float32) for length in lengths
    )
    if call.kernel != "tokamax_fixed":  # which is for heads whose norms bound their scores
        query[:, :, 1, 0] = 0.0
        key[:, call.valid - 1, 1, 0] = 128.0 / (call.scale * call.width**0.5)
    value[:, call.valid :] = PADDING
    if call.causal:
        # The more keys a query sees, the smaller its gradient. Those of the first queries can cancel out to their
        # rounding errors, which must be small beside the others' gradients.
        gradient *= np.sqrt(np.arange(1, call.queries + 1, dtype=np.float32))[:, None, None]
    return [query, key, value, gradient]


def _band(call: Call) -> Band:
    """Random lines through a grid of as many tokens as there are keys, 8 pixels wide each."""
    rows = max(n for n in range(1, math.isqrt(call.keys) + 1) if call.keys % n == 0)
    grid = (rows, call.keys // rows)
    points = token_points(grid, (8 * grid[0], 8 * grid[1]))
    random = np.random.default_rng(1)
    angles, through = random.uniform(0, 2 * np.pi, call.queries), points[random.integers(0, call.keys, call.queries)]
    a, b = np.cos(angles), np.sin(angles)
    lines = np.stack([a, b, -(a * through[:, 0] + b * through[:, 1])], axis=-1, dtype=np.float32)[None]
    return Band(lines, points, np.full(1, 12.0, np.float32), np.full(1, 0.5, np.float32))


def _difference(name: str, got: jax.Array, want: jax.Array, valid: int) -> Difference:
    got, want = got[:, :valid].astype(jnp.float32), want[:, :valid]
    error, size = (jnp.sqrt(jnp.mean(jnp.square(array), axis=-1)) for array in (got - want, want))
    whole = jnp.maximum(LEAST, jnp.sqrt(jnp.mean(jnp.square(size), axis=1, keepdims=True)))
    overall = jnp.sqrt(jnp.mean(jnp.square(error), axis=1, keepdims=True)) / whole
    token = jnp.max(error / jnp.maximum(size, whole), axis=1)
    # The worse head; what is not finite is out of all bounds, in the kernel and in what it is compared with.
    overall, token = (float(jnp.max(jnp.where(jnp.isfinite(array), array, jnp.inf))) for array in (overall, token))
    return Difference(name, overall, token)
