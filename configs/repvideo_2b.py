"""RepVideo-2B: CogVideoX-2B with gates between its layers, trained on from its weights: 49 frames of 480x720.

Should reach: the published model (arXiv 2501.08994): 50,000 steps of 32 clips at a learning rate of 1e-5 on a million
captioned clips; its weights were released after 35,000. What the gates add shows beside the same run with
`--set task.denoiser.aggregation.initial=0 --set optimizer.frozen=denoiser/aggregation/gates`, which is CogVideoX
trained on in the same way. Chips: v5e-128, v5p-64 or v6e-128, one clip for 4. Data: latents of CogVideoX's VAE, cached
as a jvgen data set; a local T5 v1.1 XXL folder. Begin with

    jvgen import CogVideoX-2b/transformer --config configs/repvideo_2b.py --init-gates --to runs/repvideo_2b

Gates start at 0.5, as released: the network begins far from CogVideoX's outputs. From `initial=0` it begins with them.
"""

from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.diffusion.guidance import GuidanceConfig
from jvgen.diffusion.objective import ObjectiveConfig
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
from jvgen.training.optimization.ema import EmaConfig
from jvgen.training.optimization.optimizer import OptimizerConfig


def experiment() -> Experiment:
    return Experiment(
        name="repvideo_2b",
        task=TextToVideoConfig(
            denoiser=repvideo_2b().replace(
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
            objective=ObjectiveConfig(target="v", bands=10),
            # What the released code samples with.
            sampler=SamplerConfig(kind="dpm_solver_sde", steps=50, levels="sat"),
            guidance=GuidanceConfig(kind="dynamic", scale=6.0),
        ),
        data=DataConfig(
            sources=(SourceConfig(path="data/latents_480x720"),),
            evaluation_sources=(SourceConfig(path="data/latents_480x720", split="validation"),),
            buckets=(BucketConfig(frames=49, height=480, width=720, batch_size=32),),
            threads=16,
        ),
        # Weight decay, betas and clipping are those of CogVideoX's released fine-tuning; the paper does not say.
        optimizer=OptimizerConfig(
            learning_rate=1e-5, warmup_steps=100, schedule="constant", weight_decay=1e-4, beta2=0.95, clip_norm=0.1
        ),
        training=TrainingConfig(steps=50_000, log_every=20, evaluate_every=1000),
        ema=EmaConfig(decays=(0.9999,)),
        checkpoint=CheckpointConfig(every=1000, keep_last=2, keep_every=5000),
        mesh=MeshConfig(fsdp=-1, seq=4),
    )
