"""A small iVideoGPT tokenizer of 32x32 frames of the embedded scenes: 64 and 16 tokens per frame, on a CPU.

Should reach: PSNR 20.8 dB on held-out future frames of scenes after 700 steps of 4 clips (27 dB on Meta-World's).
Chips: a CPU with 2 cores.
Memory: not measured.
Time: minutes for the whole run (estimated from the experiment).
Data: `jvgen data build scenes --out runs/world/scenes --set frames=12 --set height=32 --set width=32 --set driven=1.0
--set kinds.image=0 --set kinds.static=0`. Run, with what follows, by `python -m tests.experiments.ivideogpt_metaworld`.
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
    """Grids of 8x8, patches of 2x2; 512 codes of either kind."""
    return CompressiveTokenizerConfig(
        resolution=32,
        block_channels=(16, 32, 64),
        layers_per_block=1,
        groups=8,
        latent_channels=16,
        code_width=16,
        context_codes=512,
        future_codes=512,
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
                    segment=SegmentConfig(choice="later", horizon=8, context=2),
                ),
            ),
            threads=2,
        ),
        # Muon compiles for minutes here: every convolution is a matrix of its own.
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=20, schedule="cosine", weight_decay=0.0),
        training=TrainingConfig(steps=800, precision=PrecisionConfig(compute_dtype="float32"), log_every=50),
        checkpoint=CheckpointConfig(every=400, keep_last=2),
    )
