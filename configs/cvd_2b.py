"""CVD on CogVideoX-2B: two views of a scene, 49 frames of 480x720, that agree; the transformer stands still.

Should reach: what the paper (arXiv 2405.17414) reaches on Stable Diffusion: matches between corresponding frames of two
views that an essential matrix explains (rotation AUC@20 57.5, translation AUC@20 19.9 on its captions), after 100,000
steps of 8 pairs at a learning rate of 1e-4; here 32 pairs a step, for 25,000. Chips: v5p-64 (`--topology v5p:4x4x4`),
two devices a pair. Data: `jvgen data build realestate10k` (clips of 97 frames are folded) and `jvgen data build webvid`
(clips of 49 are warped), both with captions, as pixels: a causal autoencoder has to see folded clips run backward.
Weights: CogVideoX-2B's transformer, autoencoder and T5 v1.1 XXL in `weights/`. What is trained (0.5 billion numbers) is
exported by itself. Samples: `jvgen sample RUN --cameras circle --views 4`.
"""

from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.data.stream.pairs import HomographyConfig
from jvgen.diffusion.collaborative import PairingConfig
from jvgen.diffusion.guidance import GuidanceConfig
from jvgen.diffusion.objective import ObjectiveConfig
from jvgen.diffusion.sampler import SamplerConfig
from jvgen.diffusion.schedule import ScheduleConfig
from jvgen.models.cogvideox_vae.config import CogVideoXVAEConfig
from jvgen.models.multiview.config import MultiViewDiTConfig, SyncConfig
from jvgen.models.t5.config import xxl
from jvgen.nn.stacked import Remat
from jvgen.parallel.mesh import MeshConfig
from jvgen.tasks.multiview import MultiViewConfig
from jvgen.tasks.text import TextConfig
from jvgen.training.config import CheckpointConfig, TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.optimization.ema import EmaConfig
from jvgen.training.optimization.optimizer import OptimizerConfig

WEIGHTS = "weights/CogVideoX-2b"


def experiment() -> Experiment:
    return Experiment(
        name="cvd_2b",
        task=MultiViewConfig(
            denoiser=MultiViewDiTConfig(
                sync=SyncConfig(every=5),
                adapter_rank=64,
                # Of weights that are read, nothing starts at zero.
                zero_init=False,
                # 17,776 tokens padded to 17,920, a multiple of the kernels' blocks.
                token_multiple=512,
                remat=Remat.FULL,
            ),
            denoiser_weights=f"{WEIGHTS}/transformer",
            text=TextConfig(
                encoder=xxl(),
                length=226,
                weights="weights/t5_v1_1_xxl",
                tokenizer="weights/t5_v1_1_xxl",
                unconditional="zeros",
            ),
            vae=CogVideoXVAEConfig.cogvideox_2b(),
            vae_weights=f"{WEIGHTS}/vae",
            latents="pixels",
            latent_scale=1.15258426,
            spatial_compression=8,
            temporal_compression=4,
            homography=HomographyConfig(),
            schedule=ScheduleConfig(kind="cogvideox", snr_shift=3.0),
            objective=ObjectiveConfig(target="v"),
            sampler=SamplerConfig(kind="ddim", steps=50),
            guidance=GuidanceConfig(kind="constant", scale=6.0),
            pairing=PairingConfig(matchings=1, repeats=3),
        ),
        data=DataConfig(
            sources=(SourceConfig(path="data/realestate10k"), SourceConfig(path="data/webvid")),
            evaluation_sources=(
                SourceConfig(path="data/realestate10k", split="validation"),
                SourceConfig(path="data/webvid", split="validation"),
            ),
            buckets=(
                BucketConfig(
                    frames=97, height=480, width=720, batch_size=32, kinds=("static",), strides=(1, 2), weight=0.7
                ),
                BucketConfig(frames=49, height=480, width=720, batch_size=32, kinds=("dynamic",), weight=0.3),
            ),
            upscale=True,
            threads=16,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, warmup_steps=500, schedule="constant", weight_decay=1e-2, beta2=0.999, clip_norm=1.0
        ),
        training=TrainingConfig(steps=25_000, log_every=20, evaluate_every=1000),
        ema=EmaConfig(decays=()),
        checkpoint=CheckpointConfig(every=1000, keep_last=2, keep_every=5000),
        mesh=MeshConfig(data=1, fsdp=-1, tensor=2),
    )
