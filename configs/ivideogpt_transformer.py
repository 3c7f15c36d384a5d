"""iVideoGPT's transformer (arXiv 2405.15223, table 3): pretrained without actions on Open X-Embodiment, or finetuned.

    jvgen train configs/ivideogpt_transformer.py:oxe_64 --workdir runs/transformer

Should reach: oxe_64, oxe_64_medium (436 million parameters), oxe_256: the released action-free models; the loss
starts at ln 16386 = 9.70, and near ln 8193 = 9.01 the model knows which ids can follow at all. bair: FVD 60.8, PSNR
24.5, SSIM 90.2, LPIPS 5.0 (without actions, `--set task.transformer.action_width=0`: 75.0, 20.4, 82.3, 9.5); robonet:
63.2, 27.8, 90.6, 4.9 (table 1: the best of 100 samples per clip, reconstructed context frames counted).
Chips: oxe_64 and oxe_256 16 of v5e (`v5e:4x4`) or 4 GPUs of 24 or 40 GB, oxe_64_medium 32 of v5e (`v5e:4x8`) or 8
GPUs of 40 GB, bair and robonet 8 of v5e (`v5e:2x4`) or 4 GPUs of 24 GB. The authors' took 19, 9, 1.5 and 10 GPU days
on four A100s (oxe_64, oxe_256, bair, robonet).
Memory: oxe_64 1.2 GiB per device (compiled); the others not compiled.
Time: oxe_64 0.09 s per step (0.06 to 0.18), 26 ms of it the frozen tokenizer (estimated from the compiled step); the
others 0.01 to 0.07 s besides tokenizing (estimated at 30% MFU). Not measured.
Data: as `ivideogpt_tokenizer.py`, without Something-Something; `jvgen export` the tokenizer first.

Finetuning starts from the action-free weights; new heads and context frames are initialized:

    jvgen import exported/ivideogpt_transformer_oxe_64/transformer --allow-partial \\
        --config configs/ivideogpt_transformer.py:robonet --to runs/robonet

Differs from the released scripts: the learning rate falls to zero at the last step (theirs is still at a fifth of its
peak when the paper stops), gradients are clipped at 1.0 (as the paper says), checkpoints are kept whatever the loss
is, validation is not augmented. Recordings with fewer actions than frames get a last action of zeros. Other runs of
the paper by `--set`: goal-conditioned is oxe_64 with `task.goal=true`, `training.steps=1000000` and the tokenizer
trained on random frames; VP2 is robonet with `data.sources.0.path=data/vp2_robosuite`,
`task.transformer.action_width=4` (RoboDesk 5), `training.steps=200000`; RoboNet at 256x256 continues oxe_256 with
`data.buckets.0.frames=12`, `data.buckets.0.batch_size=32`, `task.transformer.action_width=5`,
`training.steps=500000`.
"""

from typing import Literal

from jvgen.data.stream.augment import AugmentationConfig
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.data.stream.oxe_mix import sources
from jvgen.models.ivideogpt.config import CompressiveTokenizerConfig, FrameTransformerConfig
from jvgen.nn.stacked import Remat
from jvgen.tasks.world_model import WorldModelConfig
from jvgen.training.config import CheckpointConfig, TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.optimization.optimizer import OptimizerConfig

ACTION_WIDTH = {"bair": 4, "robonet": 5}
STEPS = {"oxe_64": 700_000, "oxe_64_medium": 700_000, "oxe_256": 350_000, "bair": 100_000, "robonet": 600_000}


def experiment(
    variant: Literal["oxe_64", "oxe_64_medium", "oxe_256", "bair", "robonet"] = "oxe_64",
) -> Experiment:
    pretraining = variant.startswith("oxe")
    transformer = FrameTransformerConfig.medium() if variant == "oxe_64_medium" else FrameTransformerConfig.small()
    tokenizer, tokenizer_run, size, batch = CompressiveTokenizerConfig.released_64(), variant, 64, 64
    if pretraining:
        data = sources("data/oxe")
        held_out = (SourceConfig(path="data/oxe/bridge", split="validation", frame_stride=2),)
        tokenizer_run = "oxe_64"
        if variant == "oxe_256":
            tokenizer, tokenizer_run, size, batch = CompressiveTokenizerConfig.released_256(), "oxe_256", 256, 16
    else:
        data = (SourceConfig(path=f"data/{variant}"),)
        held_out = (SourceConfig(path=f"data/{variant}", split="validation"),)
        transformer = transformer.replace(action_width=ACTION_WIDTH[variant])
        if variant == "bair":
            tokenizer = tokenizer.replace(context_frames=1)
    return Experiment(
        name=f"ivideogpt_transformer_{variant}",
        task=WorldModelConfig(
            transformer=transformer.replace(remat=Remat.FULL),
            tokenizer=tokenizer,
            tokenizer_weights=f"exported/ivideogpt_tokenizer_{tokenizer_run}/tokenizer",
        ),
        data=DataConfig(
            sources=data,
            evaluation_sources=held_out,
            buckets=(
                BucketConfig(frames=12 if variant == "robonet" else 16, height=size, width=size, batch_size=batch),
            ),
            upscale=variant != "bair",
            augmentation=AugmentationConfig(),
            threads=16,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, warmup_steps=5000, schedule="cosine", beta2=0.999, weight_decay=0.01
        ),
        training=TrainingConfig(
            steps=STEPS[variant],
            log_every=100,
            evaluate_every=10_000 if pretraining else 5000,
            visualize_every=10_000,
        ),
        checkpoint=CheckpointConfig(every=5000, keep_last=2, **({"keep_every": 50_000} if pretraining else {})),
    )
