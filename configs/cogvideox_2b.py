"""CogVideoX-2B from scratch (arXiv 2408.06072): 49 frames of 480x720 at 8 frames/s, one clip per 4 chips.

Should reach: less than the paper's 480p stage, which has 15.6 times as many clips in as many steps; the published
model was trained for about 750,000 steps in several stages (table 7).
Chips: 256 of v5e (`--topology v5e:16x16`), 128 of v5p (`v5p:4x4x8`) or 256 of v6e (`v6e:16x16`).
Memory: 6.4 GiB per device on v5e and v6e, 21.2 on v5p (compiled).
Time: 1.11 s per step on v5e, within 0.95 and 1.71 (41% MFU), 0.76 s on v5p, within 0.72 and 1.05 (51.5%), and 0.57 s on
v6e, within 0.42 and 0.96 (17%; 74 ms of it for T5's weights, which cached text spares), estimated from compiled
programs, not measured.
Data: `jvgen data build latents VIDEOS --vae weights/CogVideoX-2b/vae --size 480x720 --frames 49 --out
data/latents_480x720`, and T5 v1.1 XXL, such as that of the published pipeline: `--set
task.text.weights=weights/CogVideoX-2b/text_encoder --set task.text.tokenizer=weights/CogVideoX-2b/tokenizer`. Without
T5 in the step: `jvgen data build text-embeddings data/latents_480x720 --t5 T5 --tokenizer TOKENIZER --out
data/with_text`, then `--set task.text.embeddings=data/with_text`, and the same folder as path of all sources.

Differs from the paper, see `docs/recipes.md`: batch 64 and not 1000; learning rate 2e-4 (the paper names none);
timesteps are not stratified; clips are not packed; one stage.
"""

from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.diffusion.guidance import GuidanceConfig
from jvgen.diffusion.objective import ObjectiveConfig
from jvgen.diffusion.sampler import SamplerConfig
from jvgen.models.video_dit.config import cogvideox_2b
from jvgen.nn.stacked import Remat
from jvgen.parallel.mesh import MeshConfig
from jvgen.tasks.cogvideox import cogvideox_2b_recipe
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
                remat=Remat.SAVE_MATMULS,
            ),
            latents="data",
            objective=ObjectiveConfig(target="v"),
            sampler=SamplerConfig(kind="ddim", steps=50),
            guidance=GuidanceConfig(kind="constant", scale=6.0),
            **cogvideox_2b_recipe(),
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
