"""Caching latents: batches on all devices while the next clips are decoded, against one clip after another."""

import dataclasses
import itertools
import tempfile
from pathlib import Path

import jax
import numpy as np

from jvgen.autoencoding.encoding import ClipEncoder
from jvgen.autoencoding.streaming import StreamingVAE
from jvgen.data.builders.build_loop import available_cpus
from jvgen.data.builders.latents import LatentsConfig, build_latents
from jvgen.data.store.records import Record
from jvgen.data.store.sources import open_source
from jvgen.data.store.writer import Writer
from jvgen.data.stream.plan import ClipSpec
from jvgen.data.stream.transforms import fit
from jvgen.data.video_files import decode_window, encode_video
from jvgen.interop.to_torch import export_network
from jvgen.models.cv_vae.config import CVVAEConfig
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.tasks.clip_vae import ClipVAE
from tests.benchmarks import timing
from tests.benchmarks.machine import Settings
from tests.benchmarks.report import Result


def run(settings: Settings) -> Result:
    """A causal video VAE and an image VAE, clips of three lengths."""
    count, size, recorded = (6, 16, (32, 48)) if settings.quick else (6, 64, (256, 456))
    image = ImageVAEConfig(block_channels=(8, 16) if settings.quick else (32, 64), layers_per_block=1, groups=4)
    networks = {"image VAE": image, "causal video VAE": CVVAEConfig.causal(image)}
    rows, samples = [], {}
    numbers = itertools.count()  # of the folders
    with tempfile.TemporaryDirectory() as text:
        root = Path(text)
        clips = root / "clips"
        with Writer(clips, description="benchmark") as writer:
            for number in range(count):
                frames = (9, 17, 13)[number % 3]
                rng = np.random.default_rng(number)
                small = rng.integers(0, 255, (frames, recorded[0] // 8, recorded[1] // 8, 3), np.uint8)
                video = encode_video(small.repeat(8, 1).repeat(8, 2), 8.0)
                writer.add("train", Record(id=str(number), kind="dynamic", clips=(video,), frames=frames,
                                           frames_per_second=8.0, height=recorded[0], width=recorded[1]))  # fmt: skip
        for name, config in networks.items():
            parameters = jax.jit(ClipVAE(config).network.init)(jax.random.key(0))
            folder = str(export_network(config, parameters, root / name.replace(" ", "_")))
            encoder = ClipEncoder(folder, [(size, size)], batch=16)
            alone = StreamingVAE(folder, chunk_frames=16)
            made: dict[str, Path] = {}

            def ours(encoder=encoder, made=made) -> None:
                made["ours"] = root / f"ours{next(numbers)}"
                chosen = LatentsConfig(sizes=((size, size),))
                build_latents(clips, made["ours"], encoder, chosen, encoder_digest="x", overwrite=True,
                              group=encoder.frames_per_latent)  # fmt: skip

            def loop(alone=alone, made=made) -> None:
                made["loop"] = root / f"loop{next(numbers)}"
                _one_by_one(clips, made["loop"], alone, size)

            sides = {"ours": ours, "loop": loop}
            for side in sides.values():
                side()  # compiles
            pairs = [open_source(made[side], "train") for side in ("ours", "loop")]
            difference = max(
                float(np.abs(np.subtract(*(s.read(row).latents.astype(np.float32) for s in pairs))).max())
                for row in range(count)
            )
            assert difference < 1e-2, f"{name}: latents differ by {difference}"
            measured = timing.in_turns(sides, settings.repeats)
            samples[name] = {side: dataclasses.asdict(sample) for side, sample in measured.items()}
            rows.append({
                "network": name, "devices": len(jax.local_devices()), "ours_clips_s": count / measured["ours"].median,
                "loop_clips_s": count / measured["loop"].median, "difference": difference,
                **timing.ratio(measured["ours"], measured["loop"]),
            })  # fmt: skip
    return Result(
        title="caching latents: clips/s, and our time over that of a loop (below 1 is faster)",
        settings={"clips": count, "size": size, "recorded": recorded, "threads": available_cpus()},
        rows=rows,
        shown=(
            "network",
            "devices",
            "ours_clips_s",
            "loop_clips_s",
            "ratio_of_medians",
            "ratio_of_processor_time",
            "middle_half",
            "difference",
        ),
        samples=samples,
        notes=("reading, decoding, resizing, encoding and writing of the same clips; compiled before.",),
    )


def _one_by_one(clips: Path, out: Path, vae: StreamingVAE, size: int) -> None:
    """What a script would do."""
    source = open_source(clips, "train")
    whole = ClipSpec(start=0, stride=1, views=(), crop_y=0.5, crop_x=0.5, flip=False, caption=-1)
    with Writer(out, description="benchmark") as writer:
        for row in range(len(source)):
            record = source.read(row)
            pixels = fit(decode_window(record.clips[0], range(record.frames)), whole, (size, size), "center_crop")
            moments = np.concatenate(list(vae.moments(iter(pixels), len(pixels))))
            writer.add(
                "train", record.replace(clips=(), height=size, width=size, latents=moments[None].astype(np.float16))
            )
