"""iVideoGPT's small transformer on 256x256 frames, pretrained action-free on Open X-Embodiment (arXiv 2405.15223).

Should reach: the released ivideogpt-oxe-256-act-free (which its authors call under-trained), 9 GPU days on four A100s;
here v5e-16 or 4 GPUs of 40 GB: sequences are those of 64x64 frames, tokens cost more to make. Data and tokenizer as in
`ivideogpt_tokenizer_oxe_256.py`; what is not taken over from the released script as in
`ivideogpt_transformer_oxe_64.py`. For RoboNet at 256x256 go on with `jvgen import --allow-partial` and `--set
data.buckets.0.frames=12 --set data.buckets.0.batch_size=32 --set task.transformer.action_width=5 --set
training.steps=500000`.
"""

from jvgen.data.stream.augment import AugmentationConfig
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.data.stream.oxe_mix import sources
from jvgen.models.ivideogpt.config import CompressiveTokenizerConfig, FrameTransformerConfig
from jvgen.nn.stacked import Remat
from jvgen.tasks.world_model import WorldModelConfig
from jvgen.training.config import CheckpointConfig, TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.optimization.optimizer import OptimizerConfig


def experiment() -> Experiment:
    return Experiment(
        name="ivideogpt_transformer_oxe_256",
        task=WorldModelConfig(
            transformer=FrameTransformerConfig.small().replace(remat=Remat.FULL),
            tokenizer=CompressiveTokenizerConfig.released_256(),
            tokenizer_weights="exported/ivideogpt_tokenizer_oxe_256/tokenizer",
        ),
        data=DataConfig(
            sources=sources("data/oxe"),
            evaluation_sources=(SourceConfig(path="data/oxe/bridge", split="validation", frame_stride=2),),
            buckets=(BucketConfig(frames=16, height=256, width=256, batch_size=16),),
            upscale=True,
            augmentation=AugmentationConfig(),
            threads=16,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, warmup_steps=5000, schedule="cosine", beta2=0.999, weight_decay=0.01
        ),
        training=TrainingConfig(steps=350_000, log_every=100, evaluate_every=10_000, visualize_every=10_000),
        checkpoint=CheckpointConfig(every=5000, keep_last=2, keep_every=50_000),
    )
