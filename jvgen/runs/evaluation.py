"""Evaluate a trained run on held-out data: the task's own metrics, measures of clips that it predicts or generates."""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from einops import rearrange

from jvgen.config import ConfigError
from jvgen.data.store.sources import splits
from jvgen.data.stream.config import SourceConfig
from jvgen.data.stream.loader import Loader
from jvgen.diffusion.guidance import GuidanceConfig
from jvgen.diffusion.sampler import SamplerConfig
from jvgen.evaluation import i3d as i3d_network
from jvgen.evaluation.camera_pose import sift
from jvgen.evaluation.clip import Clip
from jvgen.evaluation.distribution import VideoDistance
from jvgen.evaluation.generated import (
    GENERATED,
    RECORDED,
    NotMeasured,
    measure_clips,
    measure_same_trajectory,
    measure_views,
)
from jvgen.evaluation.report import Report
from jvgen.evaluation.vbench import RATE
from jvgen.runs.frame_features import subject_features
from jvgen.runs.generation import largest_bucket
from jvgen.runs.held_out import HeldOut, SamplingOptions, generate_clips, generate_views, read_held_out, with_caption
from jvgen.runs.inference import LoadedRun, open_run, read_experiment, with_lpips, with_vae
from jvgen.storage import Path, write_text
from jvgen.tasks.task import SampleRequest
from jvgen.terminal import progress
from jvgen.training.experiment import Experiment
from jvgen.training.state import EVALUATE, key_for
from jvgen.training.telemetry.metrics import RunningMeans

SHOWN = 8  # clips in a report
NO_SAMPLES = SamplingOptions()


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
      metrics: numbers by name.
      not_measured: what could be measured by other options, and by which.
      shown: clips for the report by name, uint8 `N F H W 3`, and their captions.
    """

    metrics: dict[str, float]
    not_measured: NotMeasured
    shown: tuple[dict[str, np.ndarray], tuple[str, ...]] = ({}, ())


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """What an evaluation needs beside the run."""

    loader: Loader
    features: Callable[[jax.Array], jax.Array] | None
    clip: Clip | None
    subjects: Callable[[np.ndarray], np.ndarray] | None


def evaluate_run(
    run: Path,
    *,
    ema: str | None = None,
    step: int | None = None,
    data: str | None = None,
    batches: int = 16,
    out: Path | None = None,
    report: Path | None = None,
    untrained: bool = False,
    sampling: SamplingOptions = NO_SAMPLES,
    i3d: Path | None = None,
    clip_model: Path | None = None,
    dinov2: Path | None = None,
    lpips: str | Path | None = None,
    vae: Path | None = None,
) -> dict[str, float]:
    """Evaluate the run in a folder, print its metrics and what was not measured, and write both.

    Args:
      run: run directory.
      ema, step, untrained: which weights, see `jvgen.runs.inference.open_run`.
      data, batches, sampling, i3d, clip_model, dinov2: see `evaluate`.
      out: JSON file to write.
      report: HTML file to write, with generated clips beside recorded ones.
      lpips: LPIPS weights, for the perceptual distance of a run that was trained with another or without.
      vae: folder of the VAE that made the latents of a run that names none, to decode generated clips.

    Raises:
      ValueError: see `evaluate`.
      CheckpointError: no such run, or no valid checkpoint.
    """
    # Mistakes are found before weights are read.
    experiment = with_vae(with_lpips(read_experiment(run), lpips), vae)
    prepared = _prepare(experiment, data, batches, sampling, i3d, clip_model, dinov2)
    loaded = open_run(run, ema, step, untrained, lpips, vae)
    result = _evaluate(loaded, prepared, batches, sampling)
    for name, value in sorted(result.metrics.items()):
        print(f"{name:36s} {value:.6g}")
    for name, reason in result.not_measured.items():
        print(f"{name}: not measured: {reason}")
    files = {"i3d": i3d, "clip_model": clip_model, "dinov2": dinov2, "lpips": lpips, "vae": vae}
    document = {
        "run": str(run), "step": loaded.step, "ema": loaded.ema, "batches": batches,
        **_described(loaded.experiment, sampling),
        "weights": {name: str(path) for name, path in files.items() if path is not None},
        "metrics": result.metrics, "not_measured": result.not_measured,
    }  # fmt: skip
    if out is not None:
        write_text(out, json.dumps(document, indent=1))
    if report is not None:
        _report(document, result).write(report)
        print(f"wrote {report}")
    return result.metrics


def evaluate(
    loaded: LoadedRun,
    *,
    data: str | None = None,
    batches: int = 16,
    sampling: SamplingOptions = NO_SAMPLES,
    i3d: Path | None = None,
    clip_model: Path | None = None,
    dinov2: Path | None = None,
) -> dict[str, float]:
    """Average the task's metrics over the first batches of held-out data, the same ones every time.

    Args:
      loaded: the run.
      data: data set folder instead of the run's evaluation sources; its validation split if it has one.
      batches: at most this many.
      sampling: how many clips a text-to-video or multi-view run generates for held-out captions and cameras, to be
        measured beside the recorded ones (`jvgen.evaluation.generated`), and how.
      i3d: safetensors file of an I3D network: also the Fréchet video distance of predicted or generated clips.
      clip_model: folder of a CLIP model: also how generated clips agree with their captions.
      dinov2: folder of a DINOv2: also how consistent the subjects of generated clips are.

    Raises:
      ValueError: no data to evaluate on; options that the run's task has no use for; weights of other networks.
    """
    prepared = _prepare(loaded.experiment, data, batches, sampling, i3d, clip_model, dinov2)
    return _evaluate(loaded, prepared, batches, sampling).metrics


def _prepare(
    experiment: Experiment,
    data: str | None,
    batches: int,
    sampling: SamplingOptions,
    i3d: Path | None,
    clip_model: Path | None,
    dinov2: Path | None = None,
) -> _Prepared:
    task = experiment.task
    if task.collects_experience:
        raise ConfigError(
            f"{type(task).__name__}: is evaluated in its environment while it trains; see evaluation.jsonl in the run "
            "directory."
        )
    if batches < 1:
        raise ConfigError(f"--batches {batches}: average over at least one batch.")
    if sampling.samples < 0 or sampling.batch < 1:
        raise ConfigError(f"--samples {sampling.samples}, --batch-size {sampling.batch}: at least 0 and at least 1.")
    if sampling.samples and not task.supports_sampling:
        need = "task.vae = none: give --vae DIR, the VAE that made the latents" if hasattr(task, "vae") else (
            f"{type(task).__name__} generates no clips from captions; leave it out"
        )  # fmt: skip
        raise ConfigError(f"--samples {sampling.samples}: {need}.")
    generates = bool(sampling.samples)
    if i3d is not None and not (task.supports_prediction or generates):
        need = (
            "give --samples N, the number of clips to generate" if task.supports_sampling
            else f"{type(task).__name__} makes no clips; for reconstructions export its VAE and give --vae DIR"
        )  # fmt: skip
        raise ConfigError(f"--i3d {i3d}: it measures predicted or generated clips; {need}.")
    for flag, folder in (("--clip-model", clip_model), ("--dinov2", dinov2)):
        if folder is not None and not generates:
            need = (
                "give --samples N" if task.supports_sampling
                else f"{type(task).__name__} makes no clips from captions; leave it out"
            )  # fmt: skip
            raise ConfigError(f"{flag} {folder}: it measures generated clips; {need}.")
    if generates:
        _effective(experiment, sampling)
    features = None if i3d is None else i3d_network.features(i3d)
    clip = None if clip_model is None else Clip(clip_model)
    subjects = None if dinov2 is None else subject_features(dinov2)
    config = experiment.data
    if data is not None:
        split = "validation" if "validation" in splits(data) else "train"
        config = config.replace(evaluation_sources=(SourceConfig(path=data, split=split),))
    if not config.evaluation_sources:
        raise ConfigError("the run names no data.evaluation_sources; name a data set with --data FOLDER.")
    task.check_data(config.replace(sources=config.evaluation_sources))
    built = task.build()
    preprocess = functools.partial(with_caption, built) if generates else built.preprocess
    loader = Loader(config, seed=experiment.seed, preprocess=preprocess, evaluation=True)
    return _Prepared(loader, features, clip, subjects)


def _evaluate(loaded: LoadedRun, prepared: _Prepared, batches: int, sampling: SamplingOptions) -> Evaluation:
    task = loaded.experiment.task
    distance = None
    if task.supports_prediction and prepared.features is not None:
        distance = VideoDistance(prepared.features)
    metrics = _task_metrics(loaded, prepared.loader, batches, distance)
    missing: NotMeasured = {}
    perceptual = getattr(task, "perceptual", None)
    if perceptual is not None and perceptual.kind != "lpips":
        missing["perceptual_lpips"] = "give --lpips-weights FILE"
    if task.supports_prediction and distance is None:
        missing["fvd"] = "give --i3d FILE"
    if not task.supports_sampling:
        return Evaluation(metrics, missing)
    if not sampling.samples:
        return Evaluation(metrics, {"measures of generated clips": "give --samples N, the number of clips to generate"})
    held_out = read_held_out(loaded, prepared.loader, sampling.samples)
    measure = _measured_views if task.supports_views else _measured_clips
    found = measure(loaded, held_out, prepared, sampling)
    return dataclasses.replace(found, metrics=metrics | {"samples": float(len(held_out.clips))} | found.metrics)


def _task_metrics(loaded: LoadedRun, loader: Loader, batches: int, distance: VideoDistance | None) -> dict[str, float]:
    compiled = loaded.program.evaluation("evaluate")
    predict = None if distance is None else loaded.program.evaluation("predicted_clips")
    means, key = RunningMeans(), jax.random.key(loaded.experiment.seed)
    with loader.batches(0, batches) as stream:
        for number, batch in enumerate(progress(stream, "evaluating", unit="batch", total=batches)):
            placed = loaded.program.shard_batch(batch.arrays, batch.bucket)
            arguments = loaded.parameters, loaded.frozen, placed, key_for(key, EVALUATE, number)
            means.add(compiled(*arguments))
            if predict is not None:
                distance.add(*map(np.asarray, predict(*arguments)))
    return means.result() | ({} if distance is None else distance.result())


def _measured_clips(loaded: LoadedRun, held_out: HeldOut, prepared: _Prepared, sampling: SamplingOptions) -> Evaluation:
    made = generate_clips(loaded, held_out, sampling)
    found, missing = measure_clips(made, held_out.clips, held_out.captions, **_networks(held_out, prepared))
    return Evaluation(found, missing, ({GENERATED: made, RECORDED: held_out.clips}, held_out.captions))


def _networks(held_out: HeldOut, prepared: _Prepared) -> dict[str, Any]:
    """Further arguments of `measure_clips`."""
    return {
        "features": prepared.features, "clip": prepared.clip, "subjects": prepared.subjects,
        "frames_per_second": held_out.frames_per_second or RATE,
    }  # fmt: skip


def _measured_views(loaded: LoadedRun, held_out: HeldOut, prepared: _Prepared, sampling: SamplingOptions) -> Evaluation:
    made, equal = generate_views(loaded, held_out, sampling)
    count = made.shape[1]
    single = [rearrange(clips, "n v ... -> (n v) ...") for clips in (made, held_out.clips)]
    captions = tuple(caption for caption in held_out.captions for _ in range(count))
    found, missing = measure_clips(*single, captions, **_networks(held_out, prepared))
    matcher = sift()
    for side, views in ((GENERATED, made), (RECORDED, held_out.clips)):
        found |= measure_views(views, held_out.cameras, side, matcher)
    found |= measure_same_trajectory(equal[:, 0], equal[:, 1])
    return Evaluation(found, missing, ({GENERATED: single[0], RECORDED: single[1]}, captions))


def _described(experiment: Experiment, sampling: SamplingOptions) -> dict[str, Any]:
    """The options that generated clips were made with, with the run's own values for those that were not given."""
    if not sampling.samples:
        return {}
    sampler, guidance = _effective(experiment, sampling)
    return {
        "samples": sampling.samples,
        "sampler_steps": sampler.steps,
        # A config keeps its scale where it turns guidance off.
        "guidance": 1.0 if guidance.kind == "none" else guidance.scale,
        "guidance_kind": guidance.kind,
        "seed": sampling.seed,
    }


def _effective(experiment: Experiment, sampling: SamplingOptions) -> tuple[SamplerConfig, GuidanceConfig]:
    """Sampler and guidance that clips are generated with; raises `ValueError` for steps that are not possible."""
    largest = largest_bucket(experiment.task, experiment.data.buckets)
    size = (experiment.task.frames_of(largest), largest.height, largest.width)
    return experiment.task.sampling(SampleRequest(*size, sampling.steps, sampling.guidance))


def _report(document: dict[str, Any], result: Evaluation) -> Report:
    page = Report(f"Evaluation of {document['run']}", f"step {document['step']}, weights {document['ema']}")
    page.section("Measures").table(sorted(result.metrics.items()), ("measure", "value"))
    if result.not_measured:
        page.table(list(result.not_measured.items()), ("not measured", "why"))
    options = {
        name: value for name, value in document.items() if name not in ("run", "step", "ema", "metrics", "not_measured")
    }
    page.section("Options").table([(name, json.dumps(value)) for name, value in options.items()], ("option", "value"))
    clips, captions = result.shown
    if clips:
        some = {name: list(each[:SHOWN]) for name, each in clips.items()}
        page.section("Clips").clips(some, captions[:SHOWN])
    return page
