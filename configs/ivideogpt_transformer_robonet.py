"""iVideoGPT's transformer finetuned on RoboNet at 64x64 with its actions, or on the data of VP2 (2405.15223, table 3).

Should reach (table 1): FVD 63.2, PSNR 27.8, SSIM 90.6, LPIPS 4.9, of 100 samples a clip the best, with reconstructed
context frames counted. Chips: v5e-8 or 4 GPUs of 24 GB, 10 GPU days on four A100s. Begin with the action-free weights:
`jvgen import exported/ivideogpt_transformer_oxe_64/transformer --allow-partial --config
configs/ivideogpt_transformer_robonet.py --to runs/robonet`. Data as in `ivideogpt_tokenizer_robonet.py`; recordings
with fewer frames than actions + 1 get a last action of zeros. For VP2: `--set data.sources.0.path=data/vp2_robosuite
--set task.transformer.action_width=4 --set training.steps=200000` (RoboDesk's actions have 5 numbers, as RoboNet's).

What is not taken over from the released script as in `ivideogpt_transformer_oxe_64.py`.
"""

from jvgen.data.stream.augment import AugmentationConfig
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.models.ivideogpt.config import CompressiveTokenizerConfig, FrameTransformerConfig
from jvgen.nn.stacked import Remat
from jvgen.tasks.world_model import WorldModelConfig
from jvgen.training.config import CheckpointConfig, TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.optimization.optimizer import OptimizerConfig


def experiment() -> Experiment:
    return Experiment(
        name="ivideogpt_transformer_robonet",
        task=WorldModelConfig(
            transformer=FrameTransformerConfig.small().replace(action_width=5, remat=Remat.FULL),
            tokenizer=CompressiveTokenizerConfig.released_64(),
            tokenizer_weights="exported/ivideogpt_tokenizer_robonet/tokenizer",
        ),
        data=DataConfig(
            sources=(SourceConfig(path="data/robonet"),),
            evaluation_sources=(SourceConfig(path="data/robonet", split="validation"),),
            buckets=(BucketConfig(frames=12, height=64, width=64, batch_size=64),),
            upscale=True,
            augmentation=AugmentationConfig(),
            threads=16,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, warmup_steps=5000, schedule="cosine", beta2=0.999, weight_decay=0.01
        ),
        training=TrainingConfig(steps=600_000, log_every=100, evaluate_every=5000, visualize_every=10_000),
        checkpoint=CheckpointConfig(every=5000, keep_last=2),
    )
