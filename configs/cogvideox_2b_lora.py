"""A LoRA of CogVideoX-2B, fine-tuned on clips of one's own: 49 frames of 480x720, rank 128 beside the attention.

Should reach: what the clips have in common, a style or a subject, after a few thousand steps; the published weights
are the start.
Chips: 8 of v5e (`--topology v5e:2x4`).
Memory: 8.0 of 15.75 GiB per device of v5e:2x4 (compiled).
Time: 3.5 s per step on v5e:2x4 (3.4 to 4.3, 35% MFU; estimated from the compiled step, not measured).
Data: as `cogvideox_2b.py`, with the published pipeline in weights/CogVideoX-2b: `docs/your_videos.md`. One GPU: `--set
mesh.seq=1 --set data.buckets.0.batch_size=1`.

The run's checkpoints hold the LoRA alone. `jvgen export RUN --to DIR` writes it as `pytorch_lora_weights.safetensors`.
"""

from pathlib import Path

from jvgen import config
from jvgen.nn.lora import LoraConfig
from jvgen.nn.stacked import Remat
from jvgen.parallel.mesh import MeshConfig
from jvgen.training.experiment import Experiment


def experiment() -> Experiment:
    made = config.load(Path(__file__).with_name("cogvideox_2b.py"))
    (bucket,) = made.data.buckets
    return made.replace(
        name="cogvideox_2b_lora",
        task=made.task.replace(
            # As compiled; whether products fit beside the weights on v5e was not tried.
            denoiser=made.task.denoiser.replace(remat=Remat.SAVE_ATTENTION),
            lora=LoraConfig(rank=128, alpha=64.0),
            denoiser_weights="weights/CogVideoX-2b/transformer",
        ),
        data=made.data.replace(buckets=(bucket.replace(batch_size=8),)),
        optimizer=made.optimizer.replace(learning_rate=2e-5, warmup_steps=100, schedule="constant"),
        training=made.training.replace(steps=4000, evaluate_every=500),
        ema=made.ema.replace(decays=(0.999,)),
        checkpoint=made.checkpoint.replace(every=500, keep_every=0),
        mesh=MeshConfig(fsdp=-1, seq=4),
    )
