"""The demo's video DiT for two views: 8 frames of 32x32 pixels from a caption and two camera paths, on a CPU.

Should reach: views of one scene that agree with each other and with their cameras better than views without
synchronization; `python -m tests.experiments.multiview_ablation` trains this config's ablations and measures them.
Chips: a CPU with 2 cores.
Memory: not measured.
Time: half an hour for the whole run (measured, 2 shared cores).
Data: after `make demo`, whose image VAE it uses:

    jvgen data build scenes --out runs/multiview/scenes --set frames=15 --set kinds.image=0 --set kinds.static=0.7 \\
        --set kinds.dynamic=0.3
    jvgen data build latents runs/multiview/scenes --vae runs/demo/export/image_vae/vae --size 32x32 --keep-clips \\
        --out runs/multiview/latents
"""

from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.diffusion.collaborative import PairingConfig
from jvgen.diffusion.guidance import GuidanceConfig
from jvgen.diffusion.objective import ObjectiveConfig, TimestepConfig
from jvgen.diffusion.sampler import SamplerConfig
from jvgen.diffusion.schedule import ScheduleConfig
from jvgen.models.byte_text.config import ByteTextConfig
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.models.multiview.config import MultiViewDiTConfig, SyncConfig
from jvgen.tasks.multiview import MultiViewConfig
from jvgen.tasks.text import TextConfig
from jvgen.training.config import CheckpointConfig, PrecisionConfig, TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.optimization.ema import EmaConfig
from jvgen.training.optimization.optimizer import OptimizerConfig

LATENTS = "runs/multiview/latents"


def experiment() -> Experiment:
    return Experiment(
        name="demo_multiview",
        task=MultiViewConfig(
            denoiser=MultiViewDiTConfig(
                layers=6,
                heads=2,
                head_width=64,
                in_channels=4,
                out_channels=4,
                text_width=128,
                text_length=48,
                condition_width=128,
                sample_height=8,
                sample_width=8,
                sample_frames=8,
                spatial_scale=1.0,
                temporal_compression=1,
                sync=SyncConfig(every=2, groups=16),
            ),
            text=TextConfig(encoder=ByteTextConfig(width=128, layers=2, heads=4), length=48),
            vae=ImageVAEConfig.tiny(),
            vae_weights="runs/demo/export/image_vae/vae",
            spatial_compression=4,
            temporal_compression=1,
            schedule=ScheduleConfig(kind="rectified_flow"),
            objective=ObjectiveConfig(target="velocity", timesteps=TimestepConfig(kind="logit_normal")),
            sampler=SamplerConfig(kind="euler", steps=25),
            guidance=GuidanceConfig(kind="constant", scale=2.0),
            pairing=PairingConfig(),
        ),
        data=DataConfig(
            sources=(SourceConfig(path=LATENTS),),
            evaluation_sources=(SourceConfig(path=LATENTS, split="validation"),),
            buckets=(
                BucketConfig(frames=15, height=32, width=32, batch_size=8, kinds=("static",), weight=0.7),
                BucketConfig(frames=8, height=32, width=32, batch_size=8, kinds=("dynamic",), weight=0.3),
            ),
            threads=2,
        ),
        optimizer=OptimizerConfig(
            kind="muon", learning_rate=6e-3, warmup_steps=10, schedule="cosine", weight_decay=0.01
        ),
        training=TrainingConfig(steps=600, precision=PrecisionConfig(compute_dtype="float32"), log_every=20),
        ema=EmaConfig(decays=(0.98,)),
        checkpoint=CheckpointConfig(every=200, keep_last=2),
    )
