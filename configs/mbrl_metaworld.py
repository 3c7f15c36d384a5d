"""Model-based reinforcement learning on Meta-World with iVideoGPT (arXiv 2405.15223, appendix A.5).

    jvgen train configs/mbrl_metaworld.py:plate_slide --workdir runs/plate_slide

An agent (DrQ-v2) acts in the environment and in a world model, which is pretrained and learns with it. The other two
ways of figure 7: `--set task.imagination.pretrained=none` trains the world model from scratch, `--set
task.imagination=none --set optimizer.frozen=` is DrQ-v2 alone, whose first 1000 steps act already. A released fault:
`--set task.imagination.released.reward_one_step_late=true`.

Should reach: success after the steps here, read off figure 7 of the paper (pretrained; from scratch; alone, where
named): button 98 (37), plate 98, hammer 87 (96), door 93, handle 98 (alone 80), coffee 86 (alone 47). The paper's is an
older Meta-World; curves compare in shape.
Chips: one of 24 GB or more; tiny versions of it ran on a CPU.
Memory: not measured.
Time: 4 hours per 100,000 simulator steps on the authors' GPU; here a rendered step takes 0.1 s and more on a CPU
(measured).
Data: none but the environment: `pip install jvgen[metaworld]` and `MUJOCO_GL=egl` (or osmesa). LPIPS weights by `jvgen
lpips`; the run of `configs/ivideogpt_transformer.py:oxe_64`, in `runs/ivideogpt_transformer_oxe_64`.
"""

from typing import Literal

from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.losses.perceptual import PerceptualConfig
from jvgen.models.ivideogpt.config import CompressiveTokenizerConfig, FrameTransformerConfig
from jvgen.reinforcement.config import ImaginationConfig, ReinforcementConfig
from jvgen.training.config import CheckpointConfig, PrecisionConfig, TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.optimization.ema import EmaConfig
from jvgen.training.optimization.optimizer import OptimizerConfig

Task = Literal[
    "button_press_topdown_wall", "plate_slide", "hammer", "door_lock", "handle_pull_side", "coffee_push"
]  # fmt: skip
# Simulator steps in figure 7.
SIMULATOR_STEPS = {
    "button_press_topdown_wall": 60_000, "plate_slide": 100_000, "hammer": 100_000, "door_lock": 160_000,
    "handle_pull_side": 200_000, "coffee_push": 400_000,
}  # fmt: skip
ACTION_REPEAT, RANDOM_STEPS, FIT_STEPS = 2, 2000, 1000


def experiment(task: Task = "plate_slide") -> Experiment:
    environment = (SourceConfig(path=f"metaworld:{task.replace('_', '-')}-v3:corner"),)
    return Experiment(
        name=f"mbrl_metaworld_{task}",
        task=ReinforcementConfig(
            imagination=ImaginationConfig(
                tokenizer=CompressiveTokenizerConfig.released_64(),
                transformer=FrameTransformerConfig.small().replace(action_width=4, reward=True),
                pretrained="runs/ivideogpt_transformer_oxe_64",
                perceptual=PerceptualConfig(kind="lpips", weights="weights/lpips_vgg.safetensors"),
                fit_steps=FIT_STEPS,
                rows_at_once=64,
            ),
            demonstrations=0 if task == "door_lock" else 5,
        ),
        data=DataConfig(
            sources=environment,
            evaluation_sources=environment,
            buckets=(BucketConfig(frames=12, height=64, width=64, batch_size=16),),
        ),
        # Of tokenizer, whose codebooks stay as they are, and transformer; the agent has its own.
        optimizer=OptimizerConfig(
            learning_rate=1e-4,
            warmup_steps=0,
            beta2=0.999,
            weight_decay=0.0,
            clip_norm=1.0,
            frozen=("tokenizer/(context|future)_codebook/.*",),
        ),
        ema=EmaConfig(decays=()),
        training=TrainingConfig(
            steps=FIT_STEPS + SIMULATOR_STEPS[task] // ACTION_REPEAT - RANDOM_STEPS,
            precision=PrecisionConfig(compute_dtype="float32"),
            log_every=100,
            evaluate_every=1000,
        ),
        checkpoint=CheckpointConfig(every=1000),
    )
