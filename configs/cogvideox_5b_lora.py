"""LoRAs of CogVideoX-5B, 1.5-5B and their image-to-video forms, fine-tuned on clips of one's own, at their own sizes.

    jvgen train configs/cogvideox_5b_lora.py:VARIANT --workdir runs/lora

Should reach: what the clips have in common, a style or a subject, after a few thousand steps.
Chips: 8 of v5e (`v5e:2x4`), one clip per 4 chips; of 1.5, 16 of v5p (`v5p:2x2x4`), one clip per 8 chips.
Memory: text_to_video 6.0 and image_to_video 6.1 of 15.75 GiB per device of v5e:2x4 (compiled). On one device alone
text_to_video takes 28.4 GiB for one clip with `task.denoiser.remat=full`, 8.9 of them T5's weights (compiled for a chip
of v5p; a GPU's program is another one, and its 80 GB hold 74.5 GiB).
Time: text_to_video 9.5 s per step on v5e:2x4 (9.2 to 12.0, 36% MFU), image_to_video 9.9 s (9.5 to 12.5, 34%);
text_to_video_1_5 10.1 s on v5p:2x2x4 (9.7 to 11.9, 32%), image_to_video_1_5 10.4 s (10.0 to 12.4, 31%), with 22.6 and
22.7 of 95.7 GiB (estimated from the compiled steps, not measured).
Data: that of `cogvideox_5b.py` or `cogvideox1_5_5b.py`, and the published pipeline, such as weights/CogVideoX-5b.

The run's checkpoints hold the LoRA alone. `jvgen export RUN --to DIR` writes it as `pytorch_lora_weights.safetensors`.
"""

from pathlib import Path
from typing import Literal

from jvgen import config
from jvgen.nn.lora import LoraConfig
from jvgen.nn.stacked import Remat
from jvgen.parallel.mesh import MeshConfig
from jvgen.training.experiment import Experiment

Variant = Literal["text_to_video", "image_to_video", "text_to_video_1_5", "image_to_video_1_5"]
# Config of the whole network, its published pipeline, devices that share a clip, what their memory holds of a layer.
BASES = {
    "text_to_video": ("cogvideox_5b.py:text_to_video", "CogVideoX-5b", 4, Remat.SAVE_ATTENTION),
    "image_to_video": ("cogvideox_5b.py:image_to_video", "CogVideoX-5b-I2V", 4, Remat.SAVE_ATTENTION),
    "text_to_video_1_5": ("cogvideox1_5_5b.py:text_to_video", "CogVideoX1.5-5B", 8, Remat.SAVE_MATMULS),
    "image_to_video_1_5": ("cogvideox1_5_5b.py:image_to_video", "CogVideoX1.5-5B-I2V", 8, Remat.SAVE_MATMULS),
}


def experiment(variant: Variant = "text_to_video") -> Experiment:
    base, pipeline, devices, remat = BASES[variant]
    made = config.load(f"{Path(__file__).parent}/{base}")
    (bucket,) = made.data.buckets
    return made.replace(
        name=f"cogvideox_5b_lora_{variant}",
        task=made.task.replace(
            denoiser=made.task.denoiser.replace(remat=remat),
            lora=LoraConfig(rank=128, alpha=64.0),
            denoiser_weights=f"weights/{pipeline}/transformer",
        ),
        data=made.data.replace(buckets=(bucket.replace(batch_size=8),)),
        optimizer=made.optimizer.replace(learning_rate=2e-5, clip_norm=1.0),
        training=made.training.replace(steps=4000, evaluate_every=500, accumulation=4),
        ema=made.ema.replace(decays=(0.999,)),
        checkpoint=made.checkpoint.replace(every=500, keep_every=0),
        mesh=MeshConfig(fsdp=-1, seq=devices),
    )
