"""Evaluation of exported VAEs on held-out clips: fidelity, and compatibility of a video VAE with an image VAE."""

import json
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jvgen.data.store.sources import splits
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.data.stream.loader import Loader
from jvgen.data.stream.source_checks import check_pixels
from jvgen.evaluation.contact_sheets import contact_sheet, png_bytes
from jvgen.evaluation.distribution import VideoDistance
from jvgen.finite import not_finite
from jvgen.interop.from_torch import import_folder, read_config
from jvgen.losses.perceptual import PerceptualConfig
from jvgen.models.cogvideox_vae.config import CogVideoXVAEConfig
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.nn.network import Parameters
from jvgen.storage import Path, write_bytes, write_text
from jvgen.tasks import compatibility
from jvgen.tasks.clip_vae import ClipVAE, VAEConfig, temporal_downsampling
from jvgen.tasks.perceptual import PerceptualDistance
from jvgen.tasks.pixels import from_uint8, unit_from_uint8
from jvgen.terminal import progress

SHEET_FRAMES = 8


def evaluate_vae(
    vae: Path,
    data: str,
    *,
    frames: int,
    size: tuple[int, int],
    stride: int = 1,
    batches: int = 16,
    batch: int = 2,
    image_vae: Path | None = None,
    lpips: str | None = None,
    out: Path | None = None,
    worst: int = 4,
    features: Callable[[jax.Array], jax.Array] | None = None,
) -> dict[str, float]:
    """Print and return means over the first clips of a data set, the same ones every time, none twice.

    Args:
      vae: exported folder of an image or video VAE.
      data: data set folder; its validation split if it has one.
      frames, size, stride: number of frames, (height, width) and frame stride of the clips.
      batches, batch: largest number of batches, and clips per batch; fewer where the data set has no more clips.
      image_vae: exported folder of the image VAE whose latents should be shared.
      lpips: LPIPS weights; without them the distance is a Laplacian pyramid's, under another name.
      out: folder for metrics.json and worst.png, the clips with the lowest PSNR: originals and reconstructions.
      worst: number of such clips.
      features: `N F H W 3` clips in [0, 1] to `N D` features (an I3D's), for the reconstructions' Fréchet distance,
        "rfvd". It is biased: compare equal numbers of clips only.

    Raises:
      ValueError: folders of other networks, or a clip size that they cannot take.
      NotFinite: a reconstruction holds NaN or infinity.
    """
    if batches < 1 or batch < 1:
        raise ValueError(f"--batches {batches}, --batch-size {batch}: at least 1 each.")
    config, image_config = _vae_config(vae), None
    _check_clip(config, frames, size)
    if image_vae is not None:
        image_config = read_config(image_vae)
        if not isinstance(image_config, ImageVAEConfig):
            raise ValueError(f"--image-vae {image_vae}: holds a {type(image_config).__name__}, not an image VAE.")
    kind = PerceptualConfig(kind="lpips", weights=lpips) if lpips else PerceptualConfig(kind="laplacian")
    perceptual, clip_vae = PerceptualDistance(kind), ClipVAE(config)
    image_clip_vae = None if image_config is None else ClipVAE(image_config)

    @jax.jit
    def run(tree: Parameters, image_tree: Parameters, frozen: Parameters, video: jax.Array) -> Any:
        clips, means = compatibility.reconstructions(clip_vae, tree, from_uint8(video), image_clip_vae, image_tree)
        fidelity = compatibility.fidelity(clips, perceptual, frozen)
        return fidelity, compatibility.statistics(means), compatibility.uint8_clips(clips)["reconstruction"]

    parameters = jax.device_put(import_folder(vae)[1])
    image_parameters = None if image_vae is None else jax.device_put(import_folder(image_vae)[1])
    frozen = jax.device_put(perceptual.load())
    rows: dict[str, list[float]] = {}
    totals: dict[str, np.ndarray] = {}
    lowest: list[tuple[float, str, np.ndarray, np.ndarray]] = []
    seen: set[str] = set()
    distance = None if features is None else VideoDistance(features, "rfvd")
    loader = _loader(data, frames, size, stride, batch)
    with loader.batches(0, batches) as stream:
        for loaded in progress(stream, "evaluating", unit="batch", total=batches):
            # Records start again when all were read.
            new = {name: row for row, name in enumerate(loaded.record_ids) if name not in seen}
            if not new:
                break
            seen.update(new)
            names, video = list(new), loaded.arrays["video"][list(new.values())]
            outputs = run(parameters, image_parameters, frozen, jnp.asarray(video))
            fidelity, statistics, (reconstructions, finite) = jax.device_get(outputs)
            if not finite.all():
                raise not_finite(f"reconstruction of {names[int(np.argmin(finite))]}", f"VAE {vae}", np.float32)
            for name, values in fidelity.items():
                rows.setdefault(name, []).extend(values.tolist())
            for name, (total, count) in statistics.items():
                totals[name] = totals.get(name, np.zeros(2)) + np.array([total, count], np.float64)
            if distance is not None:
                distance.add(*(np.asarray(unit_from_uint8(jnp.asarray(clips))) for clips in (video, reconstructions)))
            lowest += zip(fidelity["psnr"].tolist(), names, video, reconstructions, strict=True)
            lowest = sorted(lowest, key=lambda row: row[0])[: max(worst, 0)]
    result = {name: float(np.mean(values)) for name, values in rows.items()}
    result |= _standard_deviations({name: total / count for name, (total, count) in totals.items()})
    if distance is not None:
        result |= distance.result()
    for name, value in sorted(result.items()):
        print(f"{name:36s} {value:.6g}")
    if perceptual.config.kind != "lpips":
        print("perceptual_laplacian is not LPIPS: give --lpips-weights FILE for LPIPS.")
    if out is not None:
        _write(out, vae, data, result, lowest)
    return result


def _write(
    out: Path, vae: Path, data: str, result: dict[str, float], lowest: list[tuple[float, str, np.ndarray, np.ndarray]]
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    worst = [{"record": name, "psnr": value} for value, name, _, _ in lowest]
    document = {"vae": str(vae), "data": str(data), "metrics": result, "worst": worst}
    write_text(out / "metrics.json", json.dumps(document, indent=1) + "\n")
    if lowest:
        pairs = [clip for _, _, original, reconstruction in lowest for clip in (original, reconstruction)]
        write_bytes(out / "worst.png", png_bytes(contact_sheet(pairs, frames=SHEET_FRAMES)))
    print(f"wrote {out / 'metrics.json'}" + (f" and {out / 'worst.png'}" if lowest else ""))


def _vae_config(folder: Path) -> VAEConfig:
    config = read_config(folder)
    if not isinstance(config, VAEConfig):
        raise ValueError(f"--vae {folder}: holds a {type(config).__name__}, not a VAE.")
    return config


def _check_clip(config: VAEConfig, frames: int, size: tuple[int, int]) -> None:
    group, side = temporal_downsampling(config), config.downsampling
    if isinstance(config, CogVideoXVAEConfig):
        group = config.frame_step
    if frames < 1 or (frames - 1) % group:
        nearest = max(frames - 1, 0) // group * group + 1
        raise ValueError(f"--frames {frames}: this VAE takes {group}n + 1; give {nearest} or {nearest + group}.")
    if any(length % side for length in size):
        raise ValueError(f"--size {size[0]}x{size[1]}: both must be multiples of {side} for this VAE.")


def _loader(data: str, frames: int, size: tuple[int, int], stride: int, batch: int) -> Loader:
    source = SourceConfig(path=data, split="validation" if "validation" in splits(data) else "train")
    check_pixels(source)
    kinds = ("image", "static", "dynamic") if frames == 1 else ("static", "dynamic")
    bucket = BucketConfig(
        frames=frames, height=size[0], width=size[1], batch_size=batch, strides=(stride,), kinds=kinds
    )
    config = DataConfig(
        sources=(source,),
        evaluation_sources=(source,),
        buckets=(bucket,),
        resize="center_crop",
        upscale=True,
        threads=2,
    )
    return Loader(config, seed=0, preprocess=lambda example: {"video": example["video"]}, evaluation=True)


def _standard_deviations(statistics: dict[str, float]) -> dict[str, float]:
    """The statistics with mean squares of latent channels replaced by standard deviations ("deviation_0")."""
    found = {}
    for name, value in statistics.items():
        if "/square_" in name:
            mean = statistics[name.replace("/square_", "/mean_")]
            found[name.replace("/square_", "/deviation_")] = math.sqrt(max(value - mean**2, 0.0))
        else:
            found[name] = value
    return found
