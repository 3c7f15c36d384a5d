"""The demo's image-to-video DiT: a clip of 17 frames of 32x32 pixels from its first frame and a caption, on a CPU.

Should reach: after 280 steps, a first frame at 31.0 dB PSNR to the given one (31.4 is the autoencoder's limit), and
clips whose motion fits their first frame; a caption against the frame is not followed (`docs/measured.md`; measured
with clips of 29 frames).
Chips: a CPU with 2 cores.
Memory: 1.7 GiB resident at most, with everything else of the process (measured).
Time: that of `demo_text_to_video.py` and the encoding of a frame; 3.4 to 4.4 s per step were measured on a machine that
was shared by ten other jobs.
Data: as `demo_text_to_video.py`, with the pixels that given frames are encoded from: `jvgen data build latents
runs/demo/scenes --vae runs/demo/export/video_vae/vae --size 32x32 --keep-clips --out runs/demo/latents_and_clips`. Set
task.latent_shift and task.latent_scale as that command prints them.
"""

from pathlib import Path

from jvgen import config
from jvgen.diffusion.objective import ObjectiveConfig, TimestepConfig
from jvgen.training.experiment import Experiment

LATENTS = "runs/demo/latents_and_clips"


def experiment() -> Experiment:
    made = config.load(Path(__file__).with_name("demo_text_to_video.py"))
    task, data = made.task, made.data
    (training,), (held_out,) = data.sources, data.evaluation_sources
    return made.replace(
        name="demo_image_to_video",
        # Input channels are those of the noise, and of the latents of the given frame. Six layers were measured.
        task=task.replace(
            denoiser=task.denoiser.replace(layers=6, in_channels=8),
            condition="first_frame",
            # It was measured with these.
            objective=ObjectiveConfig(target="velocity", timesteps=TimestepConfig(kind="logit_normal")),
            sampler=task.sampler.replace(steps=25),
        ),
        data=data.replace(
            sources=(training.replace(path=LATENTS),), evaluation_sources=(held_out.replace(path=LATENTS),)
        ),
        training=made.training.replace(steps=460),
        checkpoint=made.checkpoint.replace(every=120),
    )
