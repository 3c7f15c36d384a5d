"""iVideoGPT's transformer finetuned on BAIR robot pushing with its actions: 1 frame of context, 15 predicted (table 3).

Should reach (arXiv 2405.15223, table 1): FVD 60.8, PSNR 24.5, SSIM 90.2, LPIPS 5.0, of 100 samples a clip the best,
with the reconstructed context frame counted; without actions (`--set task.transformer.action_width=0`) FVD 75.0, PSNR
20.4, SSIM 82.3, LPIPS 9.5. Chips: v5e-8 or 4 GPUs of 24 GB, 1.5 GPU days on four A100s. Begin with the action-free
weights: `jvgen import exported/ivideogpt_transformer_oxe_64/transformer --allow-partial --config
configs/ivideogpt_transformer_bair.py --to runs/bair`. Data as in `ivideogpt_tokenizer_bair.py`.

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
        name="ivideogpt_transformer_bair",
        task=WorldModelConfig(
            transformer=FrameTransformerConfig.small().replace(action_width=4, remat=Remat.FULL),
            tokenizer=CompressiveTokenizerConfig.released_64().replace(context_frames=1),
            tokenizer_weights="exported/ivideogpt_tokenizer_bair/tokenizer",
        ),
        data=DataConfig(
            sources=(SourceConfig(path="data/bair"),),
            evaluation_sources=(SourceConfig(path="data/bair", split="validation"),),
            buckets=(BucketConfig(frames=16, height=64, width=64, batch_size=64),),
            augmentation=AugmentationConfig(),
            threads=16,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, warmup_steps=5000, schedule="cosine", beta2=0.999, weight_decay=0.01
        ),
        training=TrainingConfig(steps=100_000, log_every=100, evaluate_every=5000, visualize_every=10_000),
        checkpoint=CheckpointConfig(every=5000, keep_last=2),
    )
