"""A small iVideoGPT tokenizer of 32x32 frames of the embedded scenes: 64 and 16 tokens per frame, on a CPU.

Should reach: PSNR 26.1 dB on held-out future frames of a cube, 21.8 dB on moving pixels (16.5 and 9.2 by copying), with
`--set data.buckets.0.batch_size=4`: half of the clips that it takes by default.
Chips: a CPU with 2 cores.
Memory: not measured.
Time: 19 minutes on two cores with twenty other processes (measured), five of them compilation and start.
Data: `jvgen data build scenes --out runs/world/scenes --train 600 --validation 32 --set frames=16 --set height=32
--set width=32 --set driven=1.0 --set kinds.image=0 --set kinds.static=0 --set wander=0 --set background=plain
--set colors=red --set shapes=cube`, then `jvgen export`.
With all colors, shapes and cameras, 800 steps of 8 clips gave every body one hue. Where few pixels move (Meta-World):
`--set task.moving_weight=10` (docs/planning.md).
"""

from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.data.stream.segments import SegmentConfig
from jvgen.losses.perceptual import PerceptualConfig
from jvgen.models.ivideogpt.config import CompressiveTokenizerConfig
from jvgen.tasks.video_tokenizer import RestartConfig, VideoTokenizerConfig
from jvgen.training.config import CheckpointConfig, PrecisionConfig, TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.optimization.optimizer import OptimizerConfig

SCENES = "runs/world/scenes"


def network() -> CompressiveTokenizerConfig:
    """Grids of 8x8, patches of 2x2; 128 codes of either kind: a world of one cube needs no more."""
    return CompressiveTokenizerConfig(
        resolution=32,
        block_channels=(16, 32, 64),
        layers_per_block=1,
        groups=8,
        latent_channels=16,
        code_width=16,
        context_codes=128,
        future_codes=128,
        patch=2,
        attention_side=16,
        attention_groups=8,
        dropout=0.0,
    )


def experiment() -> Experiment:
    return Experiment(
        name="demo_ivideogpt_tokenizer",
        task=VideoTokenizerConfig(
            network=network(),
            perceptual=PerceptualConfig(kind="laplacian", levels=3),
            perceptual_weight=0.25,
            # So few steps leave most codes where they began; the published runs do without.
            restart=RestartConfig(every=10),
        ),
        data=DataConfig(
            sources=(SourceConfig(path=SCENES),),
            evaluation_sources=(SourceConfig(path=SCENES, split="validation"),),
            buckets=(
                BucketConfig(
                    frames=5,
                    height=32,
                    width=32,
                    batch_size=8,
                    segment=SegmentConfig(choice="later", horizon=12, context=2),
                ),
            ),
            threads=2,
        ),
        # Muon compiles for minutes here: every convolution is a matrix of its own.
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=20, schedule="cosine", weight_decay=0.0),
        training=TrainingConfig(steps=450, precision=PrecisionConfig(compute_dtype="float32"), log_every=50),
        checkpoint=CheckpointConfig(every=150, keep_last=2),
    )
