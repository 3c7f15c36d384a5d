"""Rematerialization of layers, and stacks of equal layers under `lax.scan`."""

import enum
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jvgen.kernels.attention import gpu
from jvgen.nn.parameter_keys import ParameterKeys
from jvgen.parallel import axes


class Remat(enum.Enum):
    """What is stored of each layer for the backward pass; everything else is recomputed."""

    NONE = "none"  # all activations: fastest, most memory
    SAVE_ATTENTION = "save_attention"  # layer inputs and the output of attention
    SAVE_MATMULS = "save_matmuls"  # layer inputs, results of matrix products without a batch axis, output of attention
    FULL = "full"  # layer inputs only: least memory
    OFFLOAD = "offload"  # as FULL, with the layer inputs in host memory

    @classmethod
    def _missing_(cls, value: object) -> "Remat | None":
        # Values of version 0.1.0.
        return {"attention": cls.SAVE_ATTENTION, "matmuls": cls.SAVE_MATMULS}.get(value)


# Names given by `jax.ad_checkpoint.checkpoint_name` inside layers.
ATTENTION_OUTPUT = "attention_output"
LAYER_INPUT = "layer_input"


def checkpointed(function: Callable[..., Any], remat: Remat, *, in_scan: bool) -> Callable[..., Any]:
    """Wrap the function of one layer in `jax.checkpoint` with the policy of `remat`.

    Args:
      in_scan: whether the calls are iterations of a `jax.lax.scan` that is not unrolled. There, forward and backward
        pass are loops of their own. Elsewhere XLA would find the recomputation equal to the forward pass and keep the
        results of that instead, so that nothing is saved: it must be kept from that.
    """
    policies = jax.checkpoint_policies
    if remat is Remat.NONE:
        return function
    attention = policies.save_from_both_policies(policies.save_only_these_names(ATTENTION_OUTPUT), gpu.is_cudnn_forward)
    policy = {
        Remat.SAVE_ATTENTION: attention,
        Remat.SAVE_MATMULS: policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, attention),
        Remat.FULL: policies.nothing_saveable,
        Remat.OFFLOAD: policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[LAYER_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[remat]
    return jax.checkpoint(function, policy=policy, prevent_cse=not in_scan)


def run_block(block: Any, remat: Remat, inputs: jax.Array, *more: Any) -> Any:
    """Call `block(inputs, *more)` with its parameters in compute sharding, under a remat policy."""
    graph, state = nnx.split(block)
    block_axes, frozen = _axes_of(state), _is_frozen(state)

    def body(state: Any, inputs: jax.Array, *more: Any) -> Any:
        inputs = checkpoint_name(inputs, LAYER_INPUT)
        return nnx.merge(graph, axes.fsdp_all_gather(state, block_axes, frozen=frozen))(inputs, *more)

    return checkpointed(body, remat, in_scan=False)(state, inputs, *more)


class Stacked(nnx.Module):
    """`count` equal layers as one module with stacked parameters.

    Args:
      constructor: makes one layer from `nnx.Rngs`.
      count: number of layers.
      rngs: source of one key per layer, from its `params` stream.
    """

    def __init__(self, constructor: Callable[[nnx.Rngs], nnx.Module], count: int, *, rngs: nnx.Rngs):
        self.count = count
        graph, _ = nnx.split(nnx.eval_shape(lambda: constructor(ParameterKeys(0))))
        keys = jax.random.split(rngs.params(), count)
        state = jax.vmap(lambda key: nnx.split(constructor(ParameterKeys(key)))[1])(keys)
        for _, variable in nnx.to_flat_state(state):
            variable.set_metadata(logical_axes=(axes.LAYERS, *variable.get_metadata()["logical_axes"]))
        self.layers = nnx.merge(graph, state)

    def scan(
        self,
        step: Callable[[nnx.Module, Any, Any], Any],
        carry: Any,
        per_layer: Any = None,
        *,
        remat: Remat = Remat.NONE,
        unroll: bool = False,
        pause_after: int | None = None,
    ) -> Any:
        """Run `carry = step(layer, carry, per_layer[i])` over the layers and return the last carry.

        Args:
          step: computes one layer.
          carry: input of the first step.
          per_layer: tree of arrays with a leading axis of `count` (flags, gates), or None.
          remat: what is stored for the backward pass.
          unroll: run the layers in a Python loop, for tests and for reading compiled programs.
          pause_after: a layer whose carry is returned too, as (last carry, that carry). The layers are then two scans.
        """

        def body(carry: Any, scanned: Any) -> tuple[Any, None]:
            variables, extra = scanned
            return step(self.layer(variables), carry, extra), None

        body, scanned = checkpointed(body, remat, in_scan=not unroll), (self.variables(), per_layer)

        def run(carry: Any, layers: slice) -> Any:
            part = scanned if layers == slice(None) else jax.tree.map(lambda leaf: leaf[layers], scanned)
            if not unroll:
                return jax.lax.scan(body, carry, part)[0]
            for index in range(self.count)[layers]:
                carry, _ = body(carry, jax.tree.map(lambda leaf, i=index: leaf[i], scanned))
            return carry

        if pause_after is None:
            return run(carry, slice(None))
        carry = paused = run(carry, slice(0, pause_after + 1))
        return run(carry, slice(pause_after + 1, None)), paused

    def variables(self) -> Any:
        """The stacked variables, a tree for `lax.scan` to slice into layers."""
        return nnx.state(self.layers)

    def layer(self, variables: Any) -> nnx.Module:
        """The module of one layer, from its slice of `variables()`, in compute sharding."""
        graph, stacked = nnx.split(self.layers)
        names = _axes_of(stacked, skip=1)
        return nnx.merge(graph, axes.fsdp_all_gather(variables, names, frozen=_is_frozen(stacked)))


def _axes_of(state: Any, skip: int = 0) -> Any:
    """Logical axes of each variable, without the first `skip` ones."""
    return jax.tree.map(
        lambda variable: variable.get_metadata()["logical_axes"][skip:],
        state,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )


def _is_frozen(state: Any) -> bool:
    """Whether variables are those of a network that is not trained, see `Network.freeze`."""
    return any(variable.get_metadata().get("frozen", False) for _, variable in nnx.to_flat_state(state))
