"""A tiny run of reinforcement learning on 16x16 scenes, for tests."""

from pathlib import Path

from jvgen.control.drq_v2 import DrQV2Config
from jvgen.data.builders.scenes import build_scenes
from jvgen.data.scenes.scenes import SceneConfig
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.models.ivideogpt.config import CompressiveTokenizerConfig, FrameTransformerConfig
from jvgen.models.ivideogpt.sampling import SamplingConfig
from jvgen.reinforcement.config import ImaginationConfig, ReinforcementConfig
from jvgen.training.config import CheckpointConfig, PrecisionConfig, TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.optimization.ema import EmaConfig
from jvgen.training.optimization.optimizer import OptimizerConfig

TOKENIZER = CompressiveTokenizerConfig(
    resolution=16, block_channels=(8, 16), layers_per_block=1, groups=4, latent_channels=4, code_width=3,
    context_codes=18, future_codes=12, attention_side=8, attention_groups=4,
)  # fmt: skip
TRANSFORMER = FrameTransformerConfig(
    vocabulary=32, width=24, layers=1, heads=3, hidden=40, max_positions=256, action_width=2, reward=True
)
AGENT = DrQV2Config(channels=4, features=6, hidden=16, batch_size=8, random_steps=12, noise_steps=50)


def scenes(folder: Path) -> Path:
    """Driven scenes of 16x16 pixels."""
    config = SceneConfig(height=16, width=16, frames=6, kinds={"dynamic": 1.0}, driven=1.0, supersampling=1)
    build_scenes(folder, config, train=3, validation=2, workers=1)
    return folder


def task(**changes) -> ReinforcementConfig:
    imagination = ImaginationConfig(
        tokenizer=TOKENIZER, transformer=TRANSFORMER, fit_steps=2, transformer_every=2, tokenizer_every=4, horizon=3,
        first_rollouts=6, rollouts=4, rollouts_every=5, tokenizer_frames=2, sampling=SamplingConfig(top_k=8),
    )  # fmt: skip
    whole = ReinforcementConfig(
        agent=AGENT, imagination=imagination, resolution=16, action_width=2, episode_steps=6, demonstrations=2,
        replay_capacity=200, replay_reserve=200, evaluation_episodes=2,
    )  # fmt: skip
    return whole.replace(**changes)


def data(source: str) -> DataConfig:
    return DataConfig(
        sources=(SourceConfig(path=source),),
        evaluation_sources=(SourceConfig(path=source, split="validation"),),
        buckets=(BucketConfig(frames=5, height=16, width=16, batch_size=4),),
    )


def experiment(source: str, steps: int = 22, **changes) -> Experiment:
    return Experiment(
        name="tiny",
        task=task(**changes),
        data=data(source),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=0, weight_decay=0.0),
        ema=EmaConfig(decays=()),
        training=TrainingConfig(
            steps=steps, precision=PrecisionConfig(compute_dtype="float32"), evaluate_every=10, tensorboard=False
        ),
        checkpoint=CheckpointConfig(every=4),
    )
