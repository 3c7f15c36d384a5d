"""Reinforcement learning on the embedded scenes: a body is pushed to a marked goal, at 32x32 pixels, on a CPU.

    jvgen train configs/demo_control.py:alone --workdir runs/control/alone

Variants: DrQ-v2 "alone"; also in a world model that starts "from_scratch"; or from a "pretrained" one. The best policy
is known: straight to the goal, a return of 1 less what is left of the way, success in every episode.

Should reach: success in 85% of episodes after 300 environment steps alone, in all with the pretrained world model,
in 39% with one from scratch (means of three seeds, which differ much); docs/reinforcement.md.
Chips: a CPU with 2 cores.
Memory: 1 GiB of the process "alone", 5 GiB with a world model while it compiles, 2.3 GiB after that (measured).
Time: "alone" 2 minutes, with a world model 8 and 5 minutes with compiled programs in the cache, on one busy core
(measured); compilation is 8 minutes more.
Data: none, the environment is the embedded scenes. For "pretrained" a world model of other scenes of this kind,
exported to `runs/control/world`: `WORKDIR/both_0` of `python -m tests.experiments.world_model_ablation`, by the command
in docs/planning_experiments.md, copied there.
"""

from pathlib import Path
from typing import Literal

from jvgen import config
from jvgen.control.drq_v2 import DrQV2Config
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.losses.perceptual import PerceptualConfig
from jvgen.reinforcement.config import ImaginationConfig, ReinforcementConfig
from jvgen.training.config import CheckpointConfig, PrecisionConfig, TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.optimization.ema import EmaConfig
from jvgen.training.optimization.optimizer import OptimizerConfig

ENVIRONMENT = "jvgen.control.scene_environment:cube_to_center"
FIT_STEPS, AGENT_STEPS = 100, 300


def experiment(variant: Literal["alone", "from_scratch", "pretrained"] = "alone") -> Experiment:
    imagination = None
    if variant != "alone":
        demo = config.load(Path(__file__).with_name("demo_ivideogpt_transformer.py")).task
        tokenizer = demo.tokenizer.replace(context_codes=128, future_codes=128)
        imagination = ImaginationConfig(
            tokenizer=tokenizer,
            # Otherwise a transformer this small loses count of the ids (jvgen/models/ivideogpt/README.md).
            transformer=demo.transformer.replace(
                vocabulary=tokenizer.vocabulary,
                max_positions=265,
                tokens_per_frame=(64, 16),
                action_everywhere=True,
            ),
            pretrained="runs/control/world" if variant == "pretrained" else None,
            perceptual=PerceptualConfig(kind="laplacian", levels=3),
            perceptual_weight=0.25,
            fit_steps=FIT_STEPS,
            transformer_every=4,
            tokenizer_every=16,
            horizon=8,
            first_rollouts=64,
            rollouts=16,
            rollouts_every=30,
        )
    fit = 0 if imagination is None else FIT_STEPS
    return Experiment(
        name=f"demo_control_{variant}",
        task=ReinforcementConfig(
            agent=DrQV2Config(
                channels=16, hidden=256, learning_rate=5e-4, batch_size=64, discount=0.9, noise_steps=600,
                random_steps=150, pad=2,
            ),
            imagination=imagination,
            resolution=32,
            action_width=2,
            episode_steps=15,
            replay_capacity=20_000,
            replay_reserve=20_000,
            evaluation_episodes=32,
        ),
        data=DataConfig(
            sources=(SourceConfig(path=ENVIRONMENT),),
            evaluation_sources=(SourceConfig(path=ENVIRONMENT),),
            buckets=(BucketConfig(frames=8, height=32, width=32, batch_size=8),),
        ),
        # Of the world model; the agent has its own.
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=20, weight_decay=0.0),
        ema=EmaConfig(decays=()),
        training=TrainingConfig(
            steps=fit + AGENT_STEPS,
            precision=PrecisionConfig(compute_dtype="float32"),
            log_every=50,
            evaluate_every=50,
            visualize_every=fit + AGENT_STEPS,
        ),
        checkpoint=CheckpointConfig(every=300),
    )  # fmt: skip
