"""RepVideo-2B (arXiv 2501.08994): CogVideoX-2B with gated averages of earlier layers, continued from its weights.

Should reach: the published model, 50,000 steps of 32 clips on a million captioned clips (released after 35,000).
Chips: 64 of v5p (`v5p:4x4x4`), one clip per 2 chips. 64 of v6e (`v6e:8x8`) with `--set sharding.frozen=replicated`,
because T5's weights would travel in every step. 128 of v5e (`v5e:8x16`) with `--set mesh.seq=4`, one clip per 4 chips.
Memory: 21.4 GiB per device on v5p:4x4x4, 21.2 on v6e:8x8, 6.5 on v5e:8x16 (compiled).
Time: 0.71 s per step on v5p:4x4x4, within 0.68 and 0.98, 0.79 s on v6e:8x8, within 0.74 and 1.23, 1.07 s on v5e:8x16,
within 0.97 and 1.64 (estimated from the compiled programs, with attention kernels that no TPU has run yet; a run checks
them on its devices before it starts).
With JAX's kernels, `--set task.denoiser.attention=tpu`, 1.08 s on v5p, within 1.05 and 1.42.
Data: as `cogvideox_2b.py`. Start with

    jvgen import weights/CogVideoX-2b/transformer --config configs/repvideo_2b.py --init-gates --to runs/repvideo_2b

Gates start at 0.5, as released: at first the outputs are far from CogVideoX's; with `initial=0` they equal them. The
baseline, CogVideoX continued in the same way, is the same command with `--set task.denoiser.aggregation.initial=0
--set optimizer.frozen=denoiser/aggregation/gates`. The constant learning rate is the paper's; the released code's
schedule decays linearly. As released, gates have weight decay, which shrinks them by 0.005% in this run; `--set
optimizer.no_weight_decay=...` exempts them. All differences: `docs/recipes.md`.
"""

from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.diffusion.guidance import GuidanceConfig
from jvgen.diffusion.objective import ObjectiveConfig
from jvgen.diffusion.sampler import SamplerConfig
from jvgen.models.video_dit.config import repvideo_2b
from jvgen.nn.stacked import Remat
from jvgen.parallel.mesh import MeshConfig
from jvgen.tasks.cogvideox import cogvideox_2b_recipe
from jvgen.tasks.text_to_video import TextToVideoConfig
from jvgen.training.config import CheckpointConfig, TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.optimization.ema import EmaConfig
from jvgen.training.optimization.optimizer import OptimizerConfig


def experiment() -> Experiment:
    return Experiment(
        name="repvideo_2b",
        task=TextToVideoConfig(
            denoiser=repvideo_2b().replace(
                # 17,776 tokens padded to 17,920: what seq = 4 and the kernels' blocks of 128 divide.
                token_multiple=512,
                remat=Remat.SAVE_MATMULS,
            ),
            latents="data",
            objective=ObjectiveConfig(target="v", bands=10),
            # What the released code samples with.
            sampler=SamplerConfig(kind="dpm_solver_sde", steps=50, levels="sat"),
            guidance=GuidanceConfig(kind="dynamic", scale=6.0),
            **cogvideox_2b_recipe(),
        ),
        data=DataConfig(
            sources=(SourceConfig(path="data/latents_480x720"),),
            evaluation_sources=(SourceConfig(path="data/latents_480x720", split="validation"),),
            buckets=(BucketConfig(frames=49, height=480, width=720, batch_size=32),),
            threads=16,
        ),
        # Weight decay, betas and clipping are those of CogVideoX's released fine-tuning; the paper does not say.
        optimizer=OptimizerConfig(
            learning_rate=1e-5, warmup_steps=100, schedule="constant", weight_decay=1e-4, beta2=0.95, clip_norm=0.1
        ),
        training=TrainingConfig(steps=50_000, log_every=20, evaluate_every=1000),
        ema=EmaConfig(decays=(0.9999,)),
        checkpoint=CheckpointConfig(every=1000, keep_last=2, keep_every=5000),
        # With the policy above the fastest on v5p:4x4x4 of those that fit, by the estimate.
        mesh=MeshConfig(fsdp=-1, seq=2),
    )
