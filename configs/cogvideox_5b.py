"""CogVideoX-5B and its image-to-video form (arXiv 2408.06072), fine-tuned: 49 frames of 480x720 at 8 frames/s.

    jvgen import weights/CogVideoX-5b/transformer --config configs/cogvideox_5b.py:VARIANT --to RUN

text_to_video and image_to_video continue the published networks (the latter CogVideoX-5b-I2V's transformer, or, with
--init-condition, that of text to video: at first the given frame has no effect). repvideo and repvideo_image_to_video
are RepVideo's gates in them (arXiv 2501.08994): pass --init-gates.

Should reach: the published models, adapted to the clips; of RepVideo from this network nothing is published.
Chips: 64 of v5p (`v5p:4x4x4`), two clips per 4 chips.
Memory: 36.7 to 37.5 of 95.7 GiB per device of v5p:4x4x4 (compiled, the four variants).
Time: text_to_video 2.0 s per step on v5p:4x4x4 (2.0 to 2.9, 53% MFU), the others 2.1 s (2.0 to 3.0, 51 to 53%;
estimated from the compiled steps, not measured).
Data: `jvgen data build latents VIDEOS --vae weights/CogVideoX-5b/vae --size 480x720 --keep-clips --out
data/latents_480x720` (text to video needs no --keep-clips; for image to video name that of CogVideoX-5b-I2V,
whose content hash is compared), and a local folder of T5 v1.1 XXL.

Differs from the released fine-tuning, see `docs/recipes.md`: batch, steps, timesteps that are not stratified.
Learned positions of the image-to-video network hold for 480x720 alone.
"""

from typing import Literal

from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.diffusion.guidance import GuidanceConfig
from jvgen.diffusion.objective import ObjectiveConfig
from jvgen.diffusion.sampler import SamplerConfig
from jvgen.models.video_dit.config import AggregationConfig, cogvideox_5b, cogvideox_5b_image_to_video
from jvgen.nn.stacked import Remat
from jvgen.parallel.mesh import MeshConfig
from jvgen.tasks.cogvideox import cogvideox_5b_recipe, first_frame_recipe
from jvgen.tasks.text_to_video import TextToVideoConfig
from jvgen.training.config import CheckpointConfig, TrainingConfig
from jvgen.training.experiment import Experiment
from jvgen.training.optimization.ema import EmaConfig
from jvgen.training.optimization.optimizer import OptimizerConfig

Variant = Literal["text_to_video", "image_to_video", "repvideo", "repvideo_image_to_video"]
DATA = "data/latents_480x720"


def experiment(variant: Variant = "text_to_video") -> Experiment:
    of_image = variant.endswith("image_to_video")
    network = cogvideox_5b_image_to_video() if of_image else cogvideox_5b()
    if variant.startswith("repvideo"):
        network = network.replace(aggregation=AggregationConfig(), output_norm_epsilon=1e-6)
    return Experiment(
        name=f"cogvideox_5b_{variant}",
        task=TextToVideoConfig(
            # 17,776 tokens padded to 17,920: what seq = 4 and the kernels' blocks of 128 divide.
            denoiser=network.replace(token_multiple=512, remat=Remat.SAVE_MATMULS),
            latents="data",
            objective=ObjectiveConfig(target="v", bands=10),
            # What the authors sample these networks with.
            sampler=SamplerConfig(kind="dpm_solver_sde", steps=50),
            guidance=GuidanceConfig(kind="dynamic", scale=6.0),
            **(first_frame_recipe("weights/CogVideoX-5b-I2V/vae") if of_image else {}),
            **cogvideox_5b_recipe(),
        ),
        data=DataConfig(
            sources=(SourceConfig(path=DATA),),
            evaluation_sources=(SourceConfig(path=DATA, split="validation"),),
            buckets=(BucketConfig(frames=49, height=480, width=720, batch_size=32),),
            threads=16,
        ),
        # CogVideoX's released fine-tuning.
        optimizer=OptimizerConfig(
            learning_rate=1e-5, warmup_steps=100, schedule="constant", weight_decay=1e-4, beta2=0.95, clip_norm=0.1
        ),
        training=TrainingConfig(steps=20_000, log_every=20, evaluate_every=1000),
        ema=EmaConfig(decays=(0.9999,)),
        checkpoint=CheckpointConfig(every=500, keep_last=2, keep_every=5000),
        mesh=MeshConfig(fsdp=-1, seq=4),
    )
