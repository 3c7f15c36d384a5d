"""iVideoGPT's tokenizer (arXiv 2405.15223, table 3): pretrained on Open X-Embodiment, or finetuned from that.

    jvgen train configs/ivideogpt_tokenizer.py:oxe_64 --workdir runs/tokenizer

Should reach: the released tokenizers, which took 17 (oxe_64), 16 (oxe_256), 2 (bair) and 8 (robonet) GPU days on four
A100s; the authors call the one of 256x256 under-trained.
Chips: oxe_64 16 of v5e (`v5e:4x4`) or 4 GPUs of 24 GB, oxe_256 32 of v5e (`v5e:4x8`) or 8 GPUs of 40 GB, bair and
robonet 8 of v5e (`v5e:2x4`) or 4 GPUs of 24 GB.
Memory: oxe_64 2.8 GiB per device (compiled); oxe_256 6.0 (XLA's optimized program). Others not
compiled: parameters, optimizer and gradients are 0.2 to 0.3 GiB per device.
Time: oxe_64 0.05 s per step, within 0.04 and 0.12 (estimated from the compiled program); oxe_256 at least
0.26 s; the others 0.2 s (estimated at 30% MFU). Not measured.
Data: one data set per entry of `jvgen.data.stream.oxe_mix` by `jvgen data build robot-episodes`, and clips of
Something-Something v2 (oxe_64); `jvgen data build robot-episodes bair --camera aux1_image --out data/bair`; `...
robonet --out data/robonet`. LPIPS weights by `jvgen lpips`. Frames have the network's size or more.

Finetuning starts from the pretrained weights; of BAIR's two context frames the last is kept:

    jvgen import exported/ivideogpt_tokenizer_oxe_64/tokenizer --allow-partial \\
        --config configs/ivideogpt_tokenizer.py:bair --to runs/bair

Steps are updates; the released script counts twice as many, every other one of which does nothing while its
discriminator is off. Differs from it: frames of Something-Something are augmented too, validation is not; the 256x256
run starts from random weights and not from aMUSEd's tokenizer. Other runs of the paper by `--set`: the
goal-conditioned model continues oxe_64 for 275,000 steps with two random context frames
(`data.buckets.0.segment.choice=shuffled`, `data.buckets.0.segment.context=0`); VP2 is robonet with
`data.sources.0.path=data/vp2_robosuite` and `training.steps=100000`; RoboNet at 256x256 continues oxe_256 with
`data.buckets.0.segment.horizon=12`, `optimizer.learning_rate=1e-4`, `training.steps=75000`, and `task.adversarial`
(weight 0.8, `norm_epsilon=0`, `norm_floor=1e-8`) for the last third.
"""

from typing import Literal

from jvgen.data.stream.augment import AugmentationConfig
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.data.stream.oxe_mix import sources
from jvgen.data.stream.segments import SegmentConfig
from jvgen.losses.perceptual import PerceptualConfig
from jvgen.models.ivideogpt.config import CompressiveTokenizerConfig
from jvgen.nn.stacked import Remat
from jvgen.tasks.video_tokenizer import VideoTokenizerConfig
from jvgen.training.config import CheckpointConfig, TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.optimization.optimizer import OptimizerConfig

BRIDGE = (SourceConfig(path="data/oxe/bridge", split="validation", frame_stride=2),)


def experiment(variant: Literal["oxe_64", "oxe_256", "bair", "robonet"] = "oxe_64") -> Experiment:
    pretraining = variant.startswith("oxe")
    network = CompressiveTokenizerConfig.released_64()
    size, batch, context, horizon, every = 64, 64, 2, 16, 5000
    if variant == "oxe_64":
        data, held_out, steps = sources("data/oxe", something="data/something"), BRIDGE, 500_000
    elif variant == "oxe_256":
        network = CompressiveTokenizerConfig.released_256().replace(remat=Remat.FULL)
        data, held_out, steps = sources("data/oxe"), BRIDGE, 125_000
        size, batch, every = 256, 32, 2500
    else:
        data = (SourceConfig(path=f"data/{variant}"),)
        held_out = (SourceConfig(path=f"data/{variant}", split="validation"),)
        steps = {"bair": 100_000, "robonet": 300_000}[variant]
        if variant == "bair":
            network, context = network.replace(context_frames=1), 1
        else:
            horizon = 12
    bucket = BucketConfig(
        frames=8, height=size, width=size, batch_size=batch,
        segment=SegmentConfig(choice="later", horizon=horizon, context=context),
    )  # fmt: skip
    return Experiment(
        name=f"ivideogpt_tokenizer_{variant}",
        task=VideoTokenizerConfig(
            network=network,
            perceptual=PerceptualConfig(kind="lpips", weights="weights/lpips_vgg.safetensors"),
        ),
        data=DataConfig(
            sources=data,
            evaluation_sources=held_out,
            buckets=(bucket,),
            upscale=variant != "bair",
            augmentation=AugmentationConfig(),
            threads=16,
        ),
        optimizer=OptimizerConfig(
            learning_rate=5e-4 if pretraining else 1e-4, warmup_steps=500, beta2=0.999, weight_decay=0.0
        ),
        training=TrainingConfig(steps=steps, log_every=100, evaluate_every=5000, visualize_every=10_000),
        checkpoint=CheckpointConfig(every=every, keep_last=2, **({"keep_every": 10 * every} if pretraining else {})),
    )
