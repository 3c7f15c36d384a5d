"""CogVideoX1.5-5B and its image-to-video form, fine-tuned: 81 frames of 768x1360 at 16 frames/s.

    jvgen import weights/CogVideoX1.5-5B/transformer --config configs/cogvideox1_5_5b.py:VARIANT --to RUN

text_to_video and image_to_video continue the published networks (the latter CogVideoX1.5-5B-I2V's transformer, or, with
--init-condition, that of text to video: at first the given frame has no effect). repvideo and repvideo_image_to_video
are RepVideo's gates in them (arXiv 2501.08994): pass --init-gates.

Should reach: the published models, adapted to the clips; of RepVideo from this network nothing is published.
Chips: 64 of v5p (`v5p:4x4x4`), two clips per 8 chips.
Memory: 44.3 to 45.2 of 95.7 GiB per device of v5p:4x4x4 (compiled, the four variants).
Time: text_to_video and repvideo 5.0 s per step on v5p:4x4x4 (4.9 to 6.1, 48 to 49% MFU), the others 5.2 s (5.1 to
6.3, 46 to 47%; estimated from the compiled steps, not measured).
Data: `jvgen data build latents VIDEOS --vae weights/CogVideoX1.5-5B/vae --size 768x1360 --keep-clips --out
data/latents_768x1360` (text to video needs no --keep-clips; for image to video name that of CogVideoX1.5-5B-I2V,
whose content hash is compared), and a local folder of T5 v1.1 XXL.

Differs from the released fine-tuning, see `docs/recipes.md`: batch, steps, timesteps that are not stratified.
Its 21 latent frames are padded to 22, the first repeated in front, as published. Other lengths and sizes:
`--set data.buckets.0.frames=161`, heights and widths that are multiples of 16.
"""

from pathlib import Path
from typing import Literal

from jvgen import config
from jvgen.data.stream.config import BucketConfig, SourceConfig
from jvgen.models.video_dit.config import cogvideox1_5_5b, cogvideox1_5_5b_image_to_video
from jvgen.parallel.mesh import MeshConfig
from jvgen.tasks.cogvideox import first_frame_recipe
from jvgen.training.experiment import Experiment

Variant = Literal["text_to_video", "image_to_video", "repvideo", "repvideo_image_to_video"]
DATA = "data/latents_768x1360"


def experiment(variant: Variant = "text_to_video") -> Experiment:
    made = config.load(f"{Path(__file__).parent}/cogvideox_5b.py:{variant}")
    base, of_image = made.task.denoiser, variant.endswith("image_to_video")
    network = cogvideox1_5_5b_image_to_video() if of_image else cogvideox1_5_5b()
    return made.replace(
        name=f"cogvideox1_5_5b_{variant}",
        task=made.task.replace(
            # 21 latent frames padded to 22, so 45,104 tokens, padded to 45,568: what seq = 8 and blocks of 128 divide.
            denoiser=network.replace(
                token_multiple=base.token_multiple,
                remat=base.remat,
                aggregation=base.aggregation,
                output_norm_epsilon=base.output_norm_epsilon,
            ),
            text=made.task.text.replace(length=network.text_length),
            **(first_frame_recipe("weights/CogVideoX1.5-5B-I2V/vae", invert_scale=True) if of_image else {}),
        ),
        data=made.data.replace(
            sources=(SourceConfig(path=DATA),),
            evaluation_sources=(SourceConfig(path=DATA, split="validation"),),
            buckets=(BucketConfig(frames=81, height=768, width=1360, batch_size=16),),
        ),
        mesh=MeshConfig(fsdp=-1, seq=8),
    )
