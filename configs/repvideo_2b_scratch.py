"""RepVideo-2B from scratch, in three stages of one run: small images, short clips, then 49 frames of 480x720.

    jvgen train configs/repvideo_2b_scratch.py:heads_128 --workdir runs/scratch

heads_64, the default, has 30 heads of 64 channels, as published; heads_128 and heads_256 have 16 of 128 and 8 of 256,
a width of 2,048. Attention takes about as many cycles for heads of 128 on v5p and v5e as for 64, and for 256 on v6e, so
that wide heads do two and four times the work in them. At the demo's scale they cost 0.4% and 1.9% of the loss
(docs/measured.md).

Should reach: nothing published. CogVideoX-2B was trained for 750,000 steps in such stages (arXiv 2408.06072, table
7); what RepVideo's gates add from the start is not known.
Chips: 256 of v5e (`v5e:16x16`), 128 of v5p (`v5p:4x4x8`) or 256 of v6e (`v6e:16x16`); each batch is about one
clip of 17,776 tokens per 4 chips. heads_128: 64 of v5p (`v5p:4x4x4`), heads_256: 64 of v6e (`v6e:8x8`), a clip per
chip, whose tokens are not shared.
Memory: heads_128 25.0 and heads_256 25.3 GiB per device for long clips with cached text (compiled); heads_64 12.9
on v5p:4x4x8 with T5 in the step (compiled).
Time: heads_128 1.15 s per step for long clips, within 1.11 and 1.51, and 1.22 s, within 1.15 and 1.71, for 960 short
ones, which `data.tokens_per_step` chooses beside them; heads_256 0.89 s, within 0.79 and 1.88, for long clips
(0.95 s with T5 in the step); heads_64 0.84 s, within 0.80 and 1.15, for long clips on v5p:4x4x8, and 0.74 s there with
`--set mesh.seq=2 --set task.denoiser.remat=save_matmuls`, 21 GiB, the fastest of a search; on v5e:16x16 1.22 s,
within 1.05 and 1.84, and 0.77 and 0.68 s for images and short clips, which chips take whole (estimated from
compiled programs, not measured).
Data: latents of CogVideoX's VAE at 256x384 and 480x720, two data sets of `jvgen data build latents`, and T5 v1.1 XXL.

Lower resolutions get less noise: timesteps shift with the number of tokens; the last stage is CogVideoX's recipe.
"""

from typing import Literal

from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.diffusion.guidance import GuidanceConfig
from jvgen.diffusion.objective import ObjectiveConfig, TimestepConfig
from jvgen.diffusion.sampler import SamplerConfig
from jvgen.models.video_dit.config import repvideo_2b
from jvgen.nn.stacked import Remat
from jvgen.parallel.mesh import MeshConfig
from jvgen.tasks.cogvideox import cogvideox_2b_recipe
from jvgen.tasks.text_to_video import TextToVideoConfig
from jvgen.training.config import CheckpointConfig, TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.optimization.curriculum import Stage, staged_buckets, staged_learning_rate, total_steps
from jvgen.training.optimization.ema import EmaConfig
from jvgen.training.optimization.optimizer import OptimizerConfig

IMAGES = BucketConfig(frames=1, height=256, width=384, batch_size=2048, kinds=("image", "dynamic"))
SHORT = BucketConfig(frames=17, height=256, width=384, batch_size=512, kinds=("dynamic",))
LONG = BucketConfig(frames=49, height=480, width=720, batch_size=64, kinds=("dynamic",))
STAGES = (
    Stage(steps=100_000, buckets=(IMAGES,), learning_rate=2e-4),
    Stage(steps=200_000, buckets=(IMAGES.replace(weight=0.25), SHORT), learning_rate=2e-4),
    Stage(steps=220_000, buckets=(SHORT.replace(weight=0.1), LONG), learning_rate=1e-4, warmup_steps=1000),
)

# Shifts, scales and gates are matrices of their own.
MODULATION_BLOCKS = {"denoiser/.*_modulation/vectors/projection": 6, "denoiser/output_modulation": 2}

Heads = Literal["heads_64", "heads_128", "heads_256"]
HEADS = {"heads_64": (30, 64), "heads_128": (16, 128), "heads_256": (8, 256)}


def experiment(variant: Heads = "heads_64") -> Experiment:
    heads, head_width = HEADS[variant]
    # A clip on one chip, or its tokens in shards that blocks of 128 divide.
    seq, remat = (4, Remat.SAVE_ATTENTION) if variant == "heads_64" else (1, Remat.SAVE_MATMULS)
    return Experiment(
        name=f"repvideo_2b_scratch_{variant}",
        task=TextToVideoConfig(
            denoiser=repvideo_2b().replace(heads=heads, head_width=head_width, token_multiple=128 * seq, remat=remat),
            latents="data",
            objective=ObjectiveConfig(
                target="v", bands=10, timesteps=TimestepConfig(shift_by="tokens", base_tokens=13 * 30 * 45)
            ),
            sampler=SamplerConfig(kind="dpm_solver_sde", steps=50, levels="sat"),
            guidance=GuidanceConfig(kind="dynamic", scale=6.0),
            **cogvideox_2b_recipe(),
        ),
        data=DataConfig(
            sources=(SourceConfig(path="data/latents_256x384"), SourceConfig(path="data/latents_480x720")),
            evaluation_sources=(SourceConfig(path="data/latents_480x720", split="validation"),),
            buckets=staged_buckets(STAGES),
            threads=16,
        ),
        # `docs/recipes.md` says why; `--set optimizer.kind=adamw` is the other, at the same learning rates.
        optimizer=OptimizerConfig(
            kind="muon",
            muon_blocks=MODULATION_BLOCKS,
            warmup_steps=1000,
            weight_decay=1e-4,
            beta2=0.95,
            clip_norm=1.0,
            **staged_learning_rate(STAGES),
        ),  # fmt: skip
        training=TrainingConfig(steps=total_steps(STAGES), log_every=20, evaluate_every=2000),
        ema=EmaConfig(decays=(0.9999,)),
        checkpoint=CheckpointConfig(every=1000, keep_last=2, keep_every=20_000),
        mesh=MeshConfig(fsdp=-1, seq=seq),
    )
