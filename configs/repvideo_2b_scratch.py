"""RepVideo-2B from nothing, in three stages of one run: small images, short clips, then 49 frames of 480x720.

Should reach: nothing published; CogVideoX-2B was trained from nothing for 750,000 steps in such stages (arXiv
2408.06072, table 7), and what RepVideo's gates bring from the start is not known. Chips: v5e-256, v5p-128 or v6e-256;
every batch is about one clip of 17,776 tokens for 4 chips. Data: latents of CogVideoX's VAE for 256x384 and for
480x720, each a jvgen data set; a local T5 v1.1 XXL folder. It goes on from any step of any stage with one command.

Lower resolutions get less noise: timesteps shift with the number of tokens, and the last stage is CogVideoX's recipe.
"""

from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.diffusion.guidance import GuidanceConfig
from jvgen.diffusion.objective import ObjectiveConfig, TimestepConfig
from jvgen.diffusion.sampler import SamplerConfig
from jvgen.diffusion.schedule import ScheduleConfig
from jvgen.models.t5.config import xxl
from jvgen.models.video_dit.config import repvideo_2b
from jvgen.nn.stacked import Remat
from jvgen.parallel.mesh import MeshConfig
from jvgen.tasks.text import TextConfig
from jvgen.tasks.text_to_video import TextToVideoConfig
from jvgen.training.config import CheckpointConfig, TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.optimization.curriculum import Stage, staged_buckets, staged_learning_rate, total_steps
from jvgen.training.optimization.ema import EmaConfig
from jvgen.training.optimization.optimizer import OptimizerConfig

IMAGES = BucketConfig(frames=1, height=256, width=384, batch_size=2048, kinds=("image", "dynamic"))
SHORT = BucketConfig(frames=17, height=256, width=384, batch_size=512, kinds=("dynamic",))
LONG = BucketConfig(frames=49, height=480, width=720, batch_size=64, kinds=("dynamic",))
STAGES = (
    Stage(steps=100_000, buckets=(IMAGES,), learning_rate=2e-4),
    Stage(steps=200_000, buckets=(IMAGES.replace(weight=0.25), SHORT), learning_rate=2e-4),
    Stage(steps=220_000, buckets=(SHORT.replace(weight=0.1), LONG), learning_rate=1e-4, warmup_steps=1000),
)


def experiment() -> Experiment:
    return Experiment(
        name="repvideo_2b_scratch",
        task=TextToVideoConfig(
            # 17,776 tokens padded to 17,920: what seq = 4 and the kernels' blocks of 128 divide.
            denoiser=repvideo_2b().replace(token_multiple=512, remat=Remat.SAVE_ATTENTION),
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
            objective=ObjectiveConfig(
                target="v", bands=10, timesteps=TimestepConfig(shift_by="tokens", base_tokens=13 * 30 * 45)
            ),
            sampler=SamplerConfig(kind="dpm_solver_sde", steps=50, levels="sat"),
            guidance=GuidanceConfig(kind="dynamic", scale=6.0),
        ),
        data=DataConfig(
            sources=(SourceConfig(path="data/latents_256x384"), SourceConfig(path="data/latents_480x720")),
            evaluation_sources=(SourceConfig(path="data/latents_480x720", split="validation"),),
            buckets=staged_buckets(STAGES),
            threads=16,
        ),
        optimizer=OptimizerConfig(
            warmup_steps=1000, weight_decay=1e-4, beta2=0.95, clip_norm=1.0, **staged_learning_rate(STAGES)
        ),
        training=TrainingConfig(steps=total_steps(STAGES), log_every=20, evaluate_every=2000),
        ema=EmaConfig(decays=(0.9999,)),
        checkpoint=CheckpointConfig(every=1000, keep_last=2, keep_every=20_000),
        mesh=MeshConfig(fsdp=-1, seq=4),
    )
