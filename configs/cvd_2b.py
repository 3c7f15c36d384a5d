"""CVD on CogVideoX-2B (arXiv 2405.17414): two consistent views of a scene, 49 frames of 480x720; the DiT is frozen.

Should reach: what the paper reaches on Stable Diffusion after 100,000 steps of 8 pairs: matches between frames of two
views that an essential matrix explains, rotation AUC@20 57.5, translation AUC@20 19.9; here 25,000 steps of 32 pairs.
Chips: 64 of v5p (`v5p:4x4x4`), two devices per pair.
Memory: 25.4 GiB per device (compiled).
Time: 2.7 s per step for folded clips, within 2.6 and 3.5, and 2.6 s for warped ones, of which the frozen encoders take
0.8 (estimated from the compiled programs, not measured).
Data: `jvgen data build realestate10k` (clips of 97 frames are folded) and `jvgen data build webvid` (clips of 49 are
warped), both with captions, as pixels: a causal autoencoder has to encode folded clips backward. Weights in
`weights/`: CogVideoX-2B's transformer and autoencoder, T5 v1.1 XXL.

Differs from the paper, see `docs/recipes.md`: the transformer, synchronization after every 5th block and not after
every motion module, 32 pairs for a quarter of the steps at the same learning rate, strengths of homographies.

The 0.5 billion trained parameters are exported separately. Sample with `jvgen sample RUN --cameras circle --views 4`.
"""

from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.data.stream.pairs import HomographyConfig
from jvgen.diffusion.collaborative import PairingConfig
from jvgen.diffusion.guidance import GuidanceConfig
from jvgen.diffusion.objective import ObjectiveConfig
from jvgen.diffusion.sampler import SamplerConfig
from jvgen.models.cogvideox_vae.config import CogVideoXVAEConfig
from jvgen.models.multiview.config import MultiViewDiTConfig, SyncConfig
from jvgen.nn.stacked import Remat
from jvgen.parallel.mesh import MeshConfig
from jvgen.parallel.rules import ShardingConfig
from jvgen.tasks.cogvideox import cogvideox_2b_recipe
from jvgen.tasks.multiview import MultiViewConfig
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
                remat=Remat.SAVE_ATTENTION,
            ),
            denoiser_weights=f"{WEIGHTS}/transformer",
            vae=CogVideoXVAEConfig.cogvideox_2b(),
            vae_weights=f"{WEIGHTS}/vae",
            latents="pixels",
            homography=HomographyConfig(),
            objective=ObjectiveConfig(target="v"),
            sampler=SamplerConfig(kind="ddim", steps=50),
            guidance=GuidanceConfig(kind="constant", scale=6.0),
            pairing=PairingConfig(matchings=1, repeats=3),
            **cogvideox_2b_recipe(),
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
        mesh=MeshConfig(data=1, fsdp=-1, seq=2),
        # T5 and the transformer of 2B are an eighth of the memory, and otherwise travel in every step.
        sharding=ShardingConfig(frozen="replicated"),
    )
