"""CogVideoX-2B from scratch on a pod: 49 frames of 480x720 at 8 a second, one clip for 4 chips.

Should reach: the published model trained for some 750,000 steps in stages (arXiv 2408.06072, table 7); this is its
main stage. Chips: v5e-256 (`--topology v5e:16x16`), v5p-128 (`v5p:4x4x8`) or v6e-256 (`v6e:16x16`); `jvgen compile`
prints memory and collectives for each. Data: latents of CogVideoX's VAE, cached as a jvgen data set; a local T5 v1.1
XXL folder.
"""

from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.diffusion.guidance import GuidanceConfig
from jvgen.diffusion.objective import ObjectiveConfig
from jvgen.diffusion.sampler import SamplerConfig
from jvgen.diffusion.schedule import ScheduleConfig
from jvgen.models.t5.config import xxl
from jvgen.models.video_dit.config import cogvideox_2b
from jvgen.nn.stacked import Remat
from jvgen.parallel.mesh import MeshConfig
from jvgen.tasks.text import TextConfig
from jvgen.tasks.text_to_video import TextToVideoConfig
from jvgen.training.config import CheckpointConfig, TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.optimization.ema import EmaConfig
from jvgen.training.optimization.optimizer import OptimizerConfig


def experiment() -> Experiment:
    return Experiment(
        name="cogvideox_2b",
        task=TextToVideoConfig(
            denoiser=cogvideox_2b().replace(
                # 17,776 tokens padded to 17,920: what seq = 4 and the kernels' blocks of 128 divide.
                token_multiple=512,
                remat=Remat.SAVE_ATTENTION,
            ),
            text=TextConfig(
                encoder=xxl(),
                length=226,
                weights="weights/t5_v1_1_xxl",
                tokenizer="weights/t5_v1_1_xxl",
                unconditional="zeros",
            ),
            latents="data",
            latent_scale=1.15258426,
            spatial_compression=8,
            temporal_compression=4,
            schedule=ScheduleConfig(kind="cogvideox", snr_shift=3.0),
            objective=ObjectiveConfig(target="v"),
            sampler=SamplerConfig(kind="ddim", steps=50),
            guidance=GuidanceConfig(kind="constant", scale=6.0),
        ),
        data=DataConfig(
            sources=(SourceConfig(path="data/latents_480x720"),),
            evaluation_sources=(SourceConfig(path="data/latents_480x720", split="validation"),),
            buckets=(BucketConfig(frames=49, height=480, width=720, batch_size=64),),
            threads=16,
        ),
        optimizer=OptimizerConfig(
            learning_rate=2e-4, warmup_steps=1000, schedule="cosine", weight_decay=1e-4, beta2=0.95, clip_norm=1.0
        ),
        training=TrainingConfig(steps=220_000, log_every=20, evaluate_every=2000),
        ema=EmaConfig(decays=(0.9999,)),
        checkpoint=CheckpointConfig(every=1000, keep_last=2, keep_every=10_000),
        mesh=MeshConfig(fsdp=-1, seq=4),
    )
