"""Makes the units of a build on the machines of a Ray cluster, with the function that makes them here."""

import collections
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jvgen.config import ConfigError
from jvgen.data.builders.jobs import BuildError
from jvgen.data.builders.units import Done, Unit, Work, make_unit, write_unit
from jvgen.data.builders.workers import in_order

# Attempts of a unit that end with the death of their process, after which its files are read in processes of their own.
_ATTEMPTS = 3
_IN_FLIGHT = 4  # units per CPU of the cluster that are submitted ahead


def make_units(folder: Path, units: Sequence[Unit], work: Work, address: str | None = None) -> Iterator[Done]:
    """Make units, in any order; yields each when it is done.

    A unit whose process or machine is lost is made again; units are committed by one rename, so each is there once.

    Args:
      folder: of the build, which all machines see under this path.
      units: what is made.
      work: picklable; jvgen must be installed on all machines.
      address: of the cluster; None for the one that this machine belongs to, or else one on this machine.

    Raises:
      ConfigError: Ray is not installed, or there is no cluster at the address.
      BuildError: a unit fails again and again.
    """
    ray = _ray()
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(address=address or _running(), log_to_driver=False, configure_logging=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"--ray-address {address}: no Ray cluster there ({error}).") from error
    try:
        yield from _scheduled(ray, folder, units, work)
    finally:
        if started:
            ray.shutdown()


def _scheduled(ray: Any, folder: Path, units: Sequence[Unit], work: Work) -> Iterator[Done]:
    errors = ray.exceptions
    lost = (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError)
    make = ray.remote(max_retries=0, num_cpus=1)(_make)
    shared = ray.put(work)
    waiting = collections.deque((unit, 1) for unit in units)
    running: dict[Any, tuple[Unit, int]] = {}
    while waiting or running:
        room = _IN_FLIGHT * max(1, int(ray.cluster_resources().get("CPU", 1))) - len(running)
        for _ in range(min(room, len(waiting))):
            unit, attempt = waiting.popleft()
            running[make.remote(str(folder), unit, shared, attempt > _ATTEMPTS)] = unit, attempt
        [ready], _ = ray.wait(list(running), num_returns=1)
        unit, attempt = running.pop(ready)
        try:
            yield ray.get(ready)
        except lost as error:
            if attempt > 2 * _ATTEMPTS:
                raise BuildError(
                    f"unit {unit.number} ({unit.jobs[0].name} ...) was lost {attempt} times: {error}"
                ) from error
            waiting.append((unit, attempt + 1))


def _make(folder: str, unit: Unit, work: Work, apart: bool) -> Done:
    """A unit; `apart`: its files are read in another process, so that one that ends it is found."""
    if not apart:
        return make_unit(Path(folder), unit, work)
    results = in_order(work.make, (job.payload for job in unit.jobs), 2, processes=True, limit=work.limit)
    return write_unit(Path(folder), unit, work, results)


def _running() -> str | None:
    """The address of the cluster that this machine says it belongs to; None starts one here."""
    return "auto" if os.environ.get("RAY_ADDRESS") else None


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ConfigError("--engine ray needs Ray: pip install 'jvgen[ray]'.") from error
    return ray
