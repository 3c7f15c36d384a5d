"""The demo's video DiT for two views: 8 frames of 32x32 pixels from a caption and two camera paths, on a CPU.

Should reach: views of one scene that agree with each other and with their cameras better than views without
synchronization; `python -m tests.experiments.multiview_ablation` trains this config's ablations and measures them.
Chips: a CPU with 2 cores.
Memory: not measured.
Time: half an hour for the whole run (measured, 2 shared cores).
Data: after `make demo`, whose image VAE it uses:

    jvgen data build scenes --out runs/multiview/scenes --set frames=15 --set kinds.image=0 --set kinds.static=0.7 \\
        --set kinds.dynamic=0.3
    jvgen data build latents runs/multiview/scenes --vae runs/demo/export/image_vae/vae --size 32x32 --keep-clips \\
        --out runs/multiview/latents
"""

from pathlib import Path

from jvgen import config
from jvgen.data.stream.config import BucketConfig
from jvgen.diffusion.collaborative import PairingConfig
from jvgen.models.multiview.config import MultiViewDiTConfig, SyncConfig
from jvgen.tasks.multiview import MultiViewConfig
from jvgen.training.experiment import Experiment

LATENTS = "runs/multiview/latents"


def experiment() -> Experiment:
    # Of single clips, from the latents of the image VAE.
    made = config.load(Path(__file__).with_name("demo_image_latents.py"))
    task, data = made.task, made.data
    (training,), (held_out,) = data.sources, data.evaluation_sources
    return made.replace(
        name="demo_multiview",
        task=MultiViewConfig(
            **{
                **vars(task),
                "denoiser": MultiViewDiTConfig(
                    **vars(task.denoiser.replace(sample_frames=8)), sync=SyncConfig(every=2, groups=16)
                ),
                "guidance": task.guidance.replace(scale=2.0),
            },
            pairing=PairingConfig(),
        ),
        data=data.replace(
            sources=(training.replace(path=LATENTS),),
            evaluation_sources=(held_out.replace(path=LATENTS),),
            buckets=(
                BucketConfig(frames=15, height=32, width=32, batch_size=8, kinds=("static",), weight=0.7),
                BucketConfig(frames=8, height=32, width=32, batch_size=8, kinds=("dynamic",), weight=0.3),
            ),
            kind_weights={},
        ),
        training=made.training.replace(steps=600),
        checkpoint=made.checkpoint.replace(every=200),
    )
