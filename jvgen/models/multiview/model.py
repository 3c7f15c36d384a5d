"""The CogVideoX denoiser for several views: ray patches at the input, synchronization modules between the blocks."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jvgen.models.multiview.config import MultiViewDiTConfig
from jvgen.models.multiview.synchronization import CrossViewSynchronization, Kernels
from jvgen.models.multiview.view_conditioning import ViewConditioning
from jvgen.models.video_dit.aggregation import RunningSum
from jvgen.models.video_dit.model import TOKENS, AttentionScale, Block, BlockContext, TokenLayout, VideoDiT
from jvgen.nn.embeddings import PatchEmbedding
from jvgen.nn.lora import Factors
from jvgen.nn.network import Parameters
from jvgen.nn.stacked import LAYER_INPUT, Stacked, checkpointed
from jvgen.parallel import axes
from jvgen.parallel.axes import constrain

RAY_CHANNELS = 6
# The layers of a block's attention that have a LoRA in `MultiViewModules`, in the order of their random keys.
ADAPTED = ("query", "key", "value", "output")


class MultiViewModules(nnx.Module):
    """The modules that several views add to a `VideoDiT`: all that is trained when the transformer is frozen.

    As configured: `sync` (a `CrossViewSynchronization` after each group of blocks), `rays` (a patch embedding) and
    `adapter` (`jvgen.nn.lora.Factors` for the attention of all blocks).
    """

    def __init__(self, config: MultiViewDiTConfig, *, rngs: nnx.Rngs):
        config.validate()
        self.config, sync = config, config.sync
        if sync is not None:

            def module(layer_rngs: nnx.Rngs) -> CrossViewSynchronization:
                return CrossViewSynchronization(
                    config.width,
                    heads=sync.heads or config.heads,
                    sublayers=sync.sublayers,
                    depth=sync.depth,
                    groups=sync.groups,
                    rngs=layer_rngs,
                )

            self.sync = Stacked(module, config.sync_layers, rngs=rngs)
        if config.rays:
            self.rays = PatchEmbedding(
                RAY_CHANNELS * config.temporal_compression,
                config.width,
                patch=config.patch_shape,
                kernel_init=nnx.initializers.zeros,
                rngs=rngs,
            )
        if config.adapter_rank:
            kernel = jax.ShapeDtypeStruct((config.layers, config.width, config.width), jnp.float32)
            layers = {name: (kernel, (axes.LAYERS, axes.EMBED, axes.EMBED)) for name in ADAPTED}
            self.adapter = Factors(layers, rank=config.adapter_rank, rngs=rngs)


class MultiViewDiT(VideoDiT):
    """A `VideoDiT` that denoises several views of a scene jointly.

    The added modules are initialized to add zeros: at first V views equal V separate clips. Its parameters are those of
    `VideoDiT` and, as "views", those of `MultiViewModules`, whose LoRA `jvgen.nn.lora.apply` puts beside the attention.
    """

    def __init__(self, config: MultiViewDiTConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.views = MultiViewModules(config, rngs=rngs)

    def __call__(
        self,
        latents: Float[Array, "R F H W C"],
        text: Float[Array, "R T K"],
        timesteps: Float[Array, "R"],
        *,
        views: ViewConditioning | None = None,
        offsets: Float[Array, "R"] | None = None,
        attention_scale: AttentionScale | None = None,
    ) -> Float[Array, "R F H W Z"]:
        """Denoise.

        Args:
          latents: noisy latent clips, in rows `examples views copies`.
          text, timesteps, offsets, attention_scale: see `VideoDiT`; one row per clip.
          views: partners, bands and rays; None for independent clips.

        Raises:
          ValueError: rows that are not examples x views x copies; see also `VideoDiT`.
        """
        if views is None:
            return super().__call__(latents, text, timesteps, offsets=offsets, attention_scale=attention_scale)
        views = views.for_rows(latents.shape[0])
        layout = self.layout((latents.shape[1], latents.shape[2], latents.shape[3]), text.shape[1])
        context = self.context(timesteps, layout, offsets=offsets, attention_scale=attention_scale)
        x = self.embed(latents, text, layout)
        if views.rays is not None and self.config.rays:
            x = _with_video(x, layout, _video(x, layout) + self.views.rays(views.rays.astype(x.dtype)))
        x = self.run_synchronized(x, context, views) if self.config.sync else self.run_blocks(x, context)
        return self.head(x, context)

    def run_synchronized(
        self, x: Float[Array, "R L D"], context: BlockContext, views: ViewConditioning
    ) -> Float[Array, "R L D"]:
        """All blocks, with a synchronization module after every `sync.every` of them: a scan of scans."""
        config, every, count = self.config, self.config.sync.every, self.config.sync_layers
        block = checkpointed(self._block_step(context), config.remat, in_scan=not config.unroll)
        sync = checkpointed(self._sync_step(context, views), config.remat, in_scan=not config.unroll)
        layers = (self.blocks.variables(), self._per_layer())
        grouped = jax.tree.map(lambda leaf: leaf.reshape(count, every, *leaf.shape[1:]), layers)

        def run(step: Any, carry: Any, scanned: Any, length: int) -> Any:
            if not config.unroll:
                return jax.lax.scan(step, carry, scanned, length=length)[0]
            for index in range(length):
                carry, _ = step(carry, jax.tree.map(lambda leaf, i=index: leaf[i], scanned))
            return carry

        def group(carry: Any, scanned: Any) -> tuple[Any, None]:
            blocks, module = scanned
            return sync(run(block, carry, blocks, every), module)

        carry = RunningSum.start(x) if config.aggregation is not None else x
        carry = run(group, carry, (grouped, self.views.sync.variables()), count)
        return carry.hidden if config.aggregation is not None else carry

    def _per_layer(self) -> dict[str, Any]:
        """Inputs of each layer besides its parameters: its index, and the gates of RepVideo's aggregation."""
        layers = self.config.layers
        found: dict[str, Any] = {"number": jnp.arange(layers)}
        if self.config.aggregation is not None:
            plan = self.aggregation.plan(layers)
            found |= {"gate": self.aggregation.values(), "count": jnp.asarray(plan.count)}
            found["resets"] = jnp.asarray(plan.resets)
        return found

    def _block_step(self, context: BlockContext) -> Any:
        def step(carry: Any, scanned: Any) -> tuple[Any, None]:
            variables, of_layer = scanned
            module: Block = self.blocks.layer(variables)
            own = dataclasses.replace(context, layer=of_layer["number"])
            if self.config.aggregation is None:
                return module(checkpoint_name(carry, LAYER_INPUT), own), None
            read = carry.mixed(of_layer["gate"], of_layer["count"])
            return carry.add(module(checkpoint_name(read, LAYER_INPUT), own), of_layer["resets"]), None

        return step

    def _sync_step(self, context: BlockContext, views: ViewConditioning) -> Any:
        layout, config = context.layout, self.config.sync

        def synchronized(x: jax.Array, module: CrossViewSynchronization) -> jax.Array:
            video = module(
                rearrange(_video(x, layout), "r (f l) c -> r f l c", f=layout.grid[0]),
                views.layout,
                views.partner,
                views.band,
                mode=config.mode,
                kernels=Kernels(self.config.attention, config.kernel),
            )
            return _with_video(x, layout, rearrange(video, "r f l c -> r (f l) c"))

        def step(carry: Any, variables: Any) -> tuple[Any, None]:
            module = self.views.sync.layer(variables)
            if self.config.aggregation is None:
                return synchronized(checkpoint_name(carry, LAYER_INPUT), module), None
            # The synchronized tokens replace those of the last layer, also in the sum that later layers average.
            hidden = synchronized(checkpoint_name(carry.hidden, LAYER_INPUT), module)
            change = hidden.astype(jnp.float32) - carry.hidden.astype(jnp.float32)
            return RunningSum(hidden, carry.total + change), None

        return step


def attention_factors(adapter: Parameters) -> Parameters:
    """The parameters of `MultiViewModules.adapter` at the paths of the transformer's layers."""
    return {"blocks": {"layers": {"attention": adapter}}}


def _video(x: jax.Array, layout: TokenLayout) -> jax.Array:
    return x[:, layout.text : layout.valid]


def _with_video(x: jax.Array, layout: TokenLayout, video: jax.Array) -> jax.Array:
    parts = [x[:, : layout.text], video, x[:, layout.valid :]]
    return constrain(jnp.concatenate(parts, axis=1), *TOKENS)
