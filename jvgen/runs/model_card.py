"""The model card of an export: README.md, with what the weights were trained on, as the run's config says it."""

from collections.abc import Iterator, Mapping, Sequence

from jvgen import __version__, saved_config
from jvgen.data.stream.config import SourceConfig
from jvgen.interop.digest import content_digest
from jvgen.storage import Path
from jvgen.tasks.weight_files import named_files
from jvgen.training.experiment import Experiment

_HEAD = """---
library_name: jvgen
tags: [jvgen, {tag}]
---

# {name}

<!-- Written by `jvgen export`. License of these weights, intended use and limits are for you to add. -->

{about}

| | |
|---|---|
{rows}

## Trained on

{sources}

{licenses}

## Other weights

{weights}
"""


def model_card(
    experiment: Experiment,
    *,
    step: int,
    ema: str,
    licenses: Mapping[str, int] | None = None,
    commit: str = "",
    imported: Sequence[Mapping[str, str]] = (),
    vae: str | Path | None = None,
) -> str:
    """The card's text, in the form that model hubs show.

    Args:
      experiment: the run's config.
      step: steps trained.
      ema: which weights these are: an EMA decay, "raw" or "best".
      licenses: records by license, of a run that allows certain licenses only (`data.licenses`).
      commit: of the code that trained them; "" if that is not known.
      imported: weights that the run began with, see `jvgen.training.checkpoint.initial.imported_weights`.
      vae: folder of the VAE that made the run's latents, if its config names none.
    """
    task = type(experiment.task).__name__.removesuffix("Config").removesuffix("Task")
    shapes = ", ".join(bucket.name for bucket in experiment.data.buckets)
    facts = {
        "config": f"`{experiment.name}`, digest `{saved_config.digest(experiment)}` (`jvgen_run.json` has both)",
        "steps": f"{step:,} of {experiment.training.steps:,}",
        "weights": {"best": "EMA of the largest decay, or raw without one", "raw": "raw"}.get(ema, f"EMA {ema}"),
        "batches": f"{shapes} (views x frames x height x width)",
        "seed": str(experiment.seed),
        "jvgen": __version__ + (f", trained at commit `{commit}`" if commit else ""),
    }
    if experiment.init_from.run:
        facts["started from"] = f"`{experiment.init_from.run}`"
    # Some of those that the task names were trained further, others were not changed.
    named = (f"* `{field}`: `{file}`" for field, file in named_files(experiment.task))
    weights = [*_given(experiment, imported, vae), *named]
    return _HEAD.format(
        tag=task.lower(),
        name=experiment.name,
        about=f"Weights of a `{task}` run of jvgen.",
        rows="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        sources="\n".join(_source(source) for source in experiment.data.sources),
        licenses=_licenses(experiment, licenses),
        weights="\n".join(weights) or "None: everything was trained from random weights.",
    )


def _source(source: SourceConfig) -> str:
    chosen = f", where `{source.where}`" if source.where else ""
    without = f", without the recordings of `{source.exclude}`" if source.exclude else ""
    return f"* `{source.path}`, split {source.split}, weight {source.weight:g}{chosen}{without}"


def _licenses(experiment: Experiment, counts: Mapping[str, int] | None) -> str:
    if not experiment.data.licenses:
        return "Licenses: the run did not restrict them (`data.licenses`); look at the data sets' own."
    listed = [f"{name} ({counts[name]:,} records)" if counts and name in counts else name
              for name in experiment.data.licenses]  # fmt: skip
    return f"Licenses of the records: {', '.join(listed)}; records of others were left out."


def _given(experiment: Experiment, imported: Sequence[Mapping[str, str]], vae: str | Path | None) -> Iterator[str]:
    """A line for each file of weights that the config does not name."""
    for one in imported:
        yield f"* {one['network']}, imported before the first step: `{one['path']}`, SHA-256 `{one['digest']}`"
    if experiment.init_from.run:
        yield f"* those of the run that it started from, `{experiment.init_from.run}`"
    if vae is not None:
        yield f"* the VAE that made the latents (`--vae`): `{vae}`, SHA-256 `{content_digest(vae)}`"
