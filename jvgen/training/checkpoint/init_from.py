"""The first state of a run from a checkpoint of another run of jvgen, without any other format in between."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jvgen import storage
from jvgen.config import ConfigError
from jvgen.nn.adaptation import Adaptation
from jvgen.parallel import processes
from jvgen.training.checkpoint import identity
from jvgen.training.checkpoint.reader import CheckpointError, CheckpointReader
from jvgen.training.config import InitFromConfig
from jvgen.training.optimization import ema, parameter_paths
from jvgen.training.program import Program
from jvgen.training.state import TrainState

# Written to a run directory that started so: which run and step, and what was not taken.
FILE = "init_from.json"
MAX_LISTED = 20
PARAMETERS, OPTIMIZER, EMA = "parameters/", "optimizer/", "ema/"
# Number of updates made, by which EMA decays warm up.
COUNT = "health/count"


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is read from the other run.

    Attributes:
      sources: name of an array of the new state -> name of the array in the checkpoint.
      random: parameters that stay randomly initialized although the pattern selects them.
      adapted: how arrays are made that the other run has in another shape, or not at all; by name.
    """

    sources: dict[str, str]
    random: tuple[str, ...]
    adapted: dict[str, Adaptation]


def check(program: Program) -> None:
    """Raise unless the run that `init_from` names has a checkpoint that fits; reads no array.

    Raises:
      ConfigError: no such run, step or EMA, a pattern that selects nothing, or arrays that do not fit, by name.
    """
    checkpoints = _open(program.experiment.init_from)
    try:
        _plan(program, checkpoints)
    finally:
        checkpoints.close()


def init_from(program: Program, workdir: storage.Path, log: Callable[[str], None]) -> TrainState:
    """A state at step 0 with the arrays that `init_from` takes from another run; `init_from.json` records them.

    Raises:
      ConfigError: see `check`.
      CheckpointError: the checkpoint is corrupt.
    """
    config = program.experiment.init_from
    checkpoints = _open(config)
    try:
        plan = _plan(program, checkpoints)
        wanted = program.abstract_state().saved()
        there = {source: _there(wanted[name], plan.adapted.get(name)) for name, source in plan.sources.items()}
        restored = checkpoints.restore(there, step=config.step, partial=True)
    finally:
        checkpoints.close()
    assert restored is not None, "the plan was made of a checkpoint"
    fresh = program.init()
    arrays = fresh.saved()
    taken = {name: restored.arrays[source] for name, source in plan.sources.items()}
    arrays |= taken
    for name, adaptation in plan.adapted.items():
        if adaptation.make is not None:
            arrays[name] = jax.jit(adaptation.make, out_shardings=wanted[name].sharding)(arrays[name])
            taken[name] = arrays[name]
    for name in arrays:
        if name.startswith(EMA) and name not in taken:
            # A copy, where the EMA is (`host_offload`): one buffer must not be donated twice.
            copied = jnp.copy(arrays[PARAMETERS + _path_in_ema(name)])
            arrays[name] = jax.device_put(copied, wanted[name].sharding)
    for path in plan.random:
        log(f"init_from: {path} is initialized randomly; {config.run} has none that fits")
    count = sum(name.startswith(PARAMETERS) for name in taken)
    total = sum(name.startswith(PARAMETERS) for name in arrays)
    kept = ", with its optimizer state" if config.keep_optimizer else ", with a new optimizer state"
    log(
        f"starting from step 0 with {count} of {total} parameters ({config.ema}) of step {restored.step} of "
        f"{config.run}{kept}"
    )
    if processes.index() == 0:
        record = {
            "run": str(storage.absolute(config.run)), "step": restored.step, "ema": config.ema,
            "arrays": sorted(taken), "random": list(plan.random),
        }  # fmt: skip
        storage.write_text(workdir / FILE, json.dumps(record, indent=1))
    return fresh.with_saved(arrays)


def _open(config: InitFromConfig) -> CheckpointReader:
    assert config.run is not None
    try:
        return CheckpointReader(storage.as_path(config.run))
    except CheckpointError as error:
        raise ConfigError(f"init_from.run = {config.run!r}: {error}") from error


def _plan(program: Program, checkpoints: CheckpointReader) -> _Plan:
    config = program.experiment.init_from
    try:
        step, saved, document = checkpoints.contents(config.step)
    except CheckpointError as error:
        raise ConfigError(f"init_from: {error}") from error
    decay = ema.select(identity.experiment_of(document).ema, config.ema)
    wanted = program.abstract_state().saved()
    paths = [name.removeprefix(PARAMETERS) for name in wanted if name.startswith(PARAMETERS)]
    selected = [path for path in paths if parameter_paths.matches(config.parameters, path)]
    if not selected:
        raise ConfigError(
            f"init_from.parameters = {config.parameters!r}: matches no parameter of this run, for example {paths[0]}."
        )
    sources: dict[str, str] = {}
    misfits: dict[str, str] = {}
    adapted: dict[str, Adaptation] = {}
    adaptations = program.task.adapted_parameters()
    for path in selected:
        # Parameters that were not trained have no EMA.
        averaged = f"{EMA}{decay}/{path}"
        source = averaged if averaged in saved else PARAMETERS + path
        problem = _misfit(wanted[PARAMETERS + path], saved.get(source))
        adaptation = None if problem is None else adaptations.get(path)
        if adaptation is not None and _fits(saved.get(source), adaptation):
            adapted[PARAMETERS + path] = adaptation
        if problem is None or (PARAMETERS + path in adapted and adaptation.source is not None):
            sources[PARAMETERS + path] = source
        elif PARAMETERS + path not in adapted:
            misfits[path] = problem
    if misfits and (not config.allow_partial or not sources):
        raise ConfigError(
            _refusal(config.run, step, misfits, "init_from.allow_partial=true initializes these randomly")
        )
    if config.keep_optimizer:
        kept = {*_taken(sources)} - {*_taken(adapted)}
        optimizer, misfits_of_optimizer = _optimizer_sources(wanted, saved, {*paths} - kept)
        if misfits_of_optimizer:
            fix = "init_from.keep_optimizer=false starts with a new optimizer state"
            raise ConfigError(_refusal(config.run, step, misfits_of_optimizer, fix))
        sources |= optimizer
    return _Plan(sources, tuple(misfits), adapted)


def _there(want: jax.ShapeDtypeStruct, adaptation: Adaptation | None) -> jax.ShapeDtypeStruct:
    """What an array is in the other run."""
    if adaptation is None:
        return want
    return jax.ShapeDtypeStruct(adaptation.source, want.dtype, sharding=want.sharding)


def _fits(saved: Mapping[str, Any] | None, adaptation: Adaptation) -> bool:
    """Whether a saved array is what a parameter is adapted from."""
    return (None if saved is None else tuple(saved["shape"])) == adaptation.source


def _taken(sources: Mapping[str, Any]) -> list[str]:
    return [name.removeprefix(PARAMETERS) for name in sources]


def _optimizer_sources(
    wanted: Mapping[str, jax.ShapeDtypeStruct], saved: Mapping[str, Any], new: set[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Arrays to keep besides the parameters, and those of the optimizer that do not fit, with the reason.

    Args:
      new: paths of parameters that are not taken: their moments and EMA start anew.
    """
    sources, misfits = {}, {}
    for name, want in wanted.items():
        if any(name.endswith(f"/{path}") for path in new):
            continue
        problem = _misfit(want, saved.get(name))
        if name.startswith(OPTIMIZER) and problem is not None:
            misfits[name] = problem
        elif problem is None and (name.startswith((OPTIMIZER, EMA)) or name == COUNT):
            sources[name] = name
    return sources, misfits


def _misfit(want: jax.ShapeDtypeStruct, saved: Mapping[str, Any] | None) -> str | None:
    """Why a saved array cannot be taken, or None."""
    if saved is None:
        return "not in the checkpoint"
    have = (tuple(saved["shape"]), saved["dtype"])
    if have == (tuple(want.shape), str(want.dtype)):
        return None
    return f"checkpoint {have[0]} {have[1]}, this run {tuple(want.shape)} {want.dtype}"


def _refusal(run: str | None, step: int, misfits: Mapping[str, str], fix: str) -> str:
    lines = [f"  {name}: {problem}" for name, problem in sorted(misfits.items())]
    more = [f"  and {len(lines) - MAX_LISTED} more"] if len(lines) > MAX_LISTED else []
    listed = "\n".join(lines[:MAX_LISTED] + more)
    return f"init_from: step {step} of {run} does not hold {len(lines)} arrays of this run:\n{listed}\n{fix}."


def _path_in_ema(name: str) -> str:
    """Path of the parameter that an EMA array averages: "ema/0.99/model/kernel" -> "model/kernel"."""
    return name.removeprefix(EMA).split("/", 1)[1]
