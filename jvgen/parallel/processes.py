"""Several processes of one run: starting together, agreeing, waiting for each other, telling each other.

Everything goes through JAX's coordination service, a key-value store that process 0 runs, and not through the devices:
it works while a device hangs, has time limits, and can say who is absent. With one process every function returns at
once. Functions that all processes call are told apart by `name`; the same name may be used again.
"""

import collections
import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from jvgen import exit_codes
from jvgen.config import ConfigError
from jvgen.parallel import clusters, jax_internals

T = TypeVar("T")

# Seconds without a heartbeat after which JAX ends all processes, with status 134.
HEARTBEAT_SECONDS = 100
# Seconds for which an ending process waits for the others (JAX's default is 300).
SHUTDOWN_SECONDS = 30
# Seconds for the processes to find each other; images are pulled and machines start at different times.
INITIALIZE_SECONDS = 300
# Seconds for which a barrier, a broadcast or a gather waits.
WAIT_SECONDS = 600.0

_EVENTS = "jvgen/events"


class LostProcess(RuntimeError):
    """Another process of this run does not answer. Starting the run again may help."""

    @property
    def exit_code(self) -> int:
        """The restart code."""
        return exit_codes.restart_code()


class ProcessesDiffer(ConfigError):
    """The processes of a run were not started alike; the message names the processes and what differs."""


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = INITIALIZE_SECONDS,
    log: Callable[[str], None] = print,
) -> clusters.Cluster | None:
    """Join the other processes of this run, if there are any, before JAX's devices are used.

    Args:
      coordinator, processes, process_id: see `jvgen.parallel.clusters.find`.
      timeout: seconds for all processes to find each other.
      log: takes one line about the cluster, and warnings.

    Returns:
      The cluster, or None for a single process.

    Raises:
      ConfigError: numbers that are incomplete or impossible.
      LostProcess: the coordinator cannot be reached.
    """
    cluster = clusters.find(coordinator, processes, process_id, timeout=timeout, log=log)
    if cluster is None:
        return None
    import jax

    host = cluster.coordinator.rpartition(":")[0]
    proxies = clusters.proxy_variables(os.environ, host)
    if proxies:
        log(
            f"WARNING: {', '.join(proxies)} may keep processes from reaching the coordinator: unset them, or add "
            f"{host} to no_proxy."
        )
    jax.config.update("jax_check_proxy_envs", False)
    # Its handler of SIGTERM would replace that of `jvgen.training.preemption`, and only note the signal.
    jax.config.update("jax_enable_preemption_service", False)
    start = time.monotonic()
    if cluster.process_id != 0:
        _wait_for_port(cluster.coordinator, timeout, log)
    with _time_limit(start + timeout - time.monotonic(), cluster, timeout):
        try:
            jax.distributed.initialize(
                cluster.coordinator,
                cluster.processes,
                cluster.process_id,
                local_device_ids=cluster.local_device_ids,
                cluster_detection_method="deactivate",
                # The limit is kept above: where JAX keeps it, the process aborts with a C++ stack.
                initialization_timeout=int(timeout) + 60,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            )
        except RuntimeError as error:
            raise LostProcess(
                f"process {cluster.process_id} of {cluster.processes} could not join at {cluster.coordinator}: {error}"
            ) from error
    attach()
    log(
        f"process {cluster.process_id} of {cluster.processes} ({cluster.name}, coordinator {cluster.coordinator}, "
        f"{jax.local_device_count()} of {jax.device_count()} devices here)"
    )
    return cluster


def _wait_for_port(address: str, timeout: float, log: Callable[[str], None]) -> None:
    """Return once the coordinator accepts a TCP connection."""
    host, _, port = address.rpartition(":")
    start = time.monotonic()
    reported, problem = start, ""
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            problem = str(error)
        now = time.monotonic()
        if now - start > timeout:
            raise LostProcess(
                f"the coordinator {address} cannot be reached for {timeout:.0f} s ({problem}). Process 0 runs it: look "
                "at its log, and at the address, the port and firewalls between the machines."
            )
        if now - reported > 30:
            reported = now
            log(f"waiting for the coordinator {address} ({problem})")
        time.sleep(min(1.0, timeout / 10))


@contextlib.contextmanager
def _time_limit(seconds: float, cluster: clusters.Cluster, timeout: float) -> Iterator[None]:
    """End the process if the body takes longer: it is C++ code that cannot be interrupted, and would abort."""
    done = threading.Event()

    def watch() -> None:
        if not done.wait(max(1.0, seconds)):
            print(
                f"jvgen: process {cluster.process_id}: not all {cluster.processes} processes joined at "
                f"{cluster.coordinator} within {timeout:.0f} s. Look at the logs of the others: one may not have "
                "started, or was given another number of processes.",
                file=sys.stderr,
                flush=True,
            )
            os._exit(exit_codes.restart_code())

    threading.Thread(target=watch, name="initialize", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def attach() -> None:
    """Listen for failures and requests of the other processes. `initialize` does it; needed once after
    `jax.distributed.initialize` was called directly."""
    global _listener
    jax_internals.check_distributed_state()
    if count() > 1 and _listener is None:
        _listener = _Listener(_client())


def _state() -> Any:
    # Public functions would start the backends, and there are none for the key-value store.
    return jax_internals.distributed_state()


def _client() -> Any:
    return _state().client


def count() -> int:
    """Number of processes of this run; does not touch a device."""
    state = _state()
    return state.num_processes if state is not None and state.client is not None else 1


def index() -> int:
    """Number of this process, from 0; does not touch a device."""
    state = _state()
    return state.process_id if state is not None and state.client is not None else 0


_uses: collections.Counter[str] = collections.Counter()


def _unique(name: str) -> str:
    """An id for one use of a name, the same on all processes because they use names in the same order."""
    _uses[name] += 1
    return f"jvgen/{name}/{_uses[name]}"


def barrier(name: str, seconds: float = WAIT_SECONDS) -> None:
    """Wait until all processes have called this.

    Raises:
      LostProcess: some did not within `seconds`; the message names them.
    """
    if count() > 1:
        _barrier(_unique(name), name, seconds)


def _barrier(identifier: str, name: str, seconds: float, text: str = "") -> None:
    client = _client()
    try:
        client.key_value_set(f"{identifier}/arrived/{index()}", text)
        client.wait_at_barrier(f"{identifier}/barrier", int(seconds * 1000))
    except RuntimeError as error:
        absent = sorted(set(range(count())) - _numbered(identifier + "/arrived").keys())
        raise LostProcess(
            f"{name}: process{'es' if len(absent) > 1 else ''} {_listed(absent)} of {count()} did not arrive within "
            f"{seconds:g} s. Look at the log of the first one."
            if absent
            else f"{name}: {str(error).splitlines()[0]}"
        ) from error


def broadcast(value: T, name: str, seconds: float = WAIT_SECONDS) -> T:
    """The value that process 0 gave, on all processes; a JSON value (tuples come back as lists).

    Raises:
      LostProcess: process 0 did not call this within `seconds`.
    """
    if count() == 1:
        return value
    key, client = f"{_unique(name)}/value", _client()
    try:
        if index() == 0:
            client.key_value_set(key, json.dumps(value))
            return json.loads(json.dumps(value))
        return json.loads(client.blocking_key_value_get(key, int(seconds * 1000)))
    except RuntimeError as error:
        raise LostProcess(
            f"{name}: process 0 gave no answer within {seconds:g} s ({str(error).splitlines()[0]})"
        ) from error


def combine(value: Any, function: Callable[[list[Any]], T], name: str, seconds: float = WAIT_SECONDS) -> T:
    """Give process 0 the JSON values of all processes, in order, and return what `function` makes of them there.

    Raises:
      LostProcess: not all processes called this within `seconds`.
    """
    if count() == 1:
        return function([value])
    identifier = _unique(name)
    _barrier(identifier, name, seconds, json.dumps(value))
    combined = None
    if index() == 0:
        arrived = _numbered(f"{identifier}/arrived")
        combined = function([json.loads(arrived[number]) for number in range(count())])
    return broadcast(combined, name, seconds)


def agree(values: Mapping[str, str | int], name: str = "agreement", seconds: float = WAIT_SECONDS) -> None:
    """Compare what should be the same on all processes.

    Args:
      values: by what they are called in the message, for example {"seed": 0}; long ones better as digests.
      name: of this comparison.
      seconds: for which the processes wait for each other.

    Raises:
      ProcessesDiffer: on all processes; lists what differs, and on which processes.
      LostProcess: not all processes called this within `seconds`.
    """
    problems = combine({key: str(value) for key, value in values.items()}, _differences, name, seconds)
    if problems:
        raise ProcessesDiffer(
            f"the {count()} processes of this run were not started alike:\n  "
            + "\n  ".join(problems)
            + "\nStart all of them with the same code, config, data and run directory (on storage that all share)."
        )


def _differences(given: list[dict[str, str]]) -> list[str]:
    problems = []
    for key in sorted({key for values in given for key in values}):
        by_value: dict[str | None, list[int]] = {}
        for number, values in enumerate(given):
            by_value.setdefault(values.get(key), []).append(number)
        if len(by_value) > 1:
            # The most common value first; between equals that of the lowest process.
            common, *others = sorted(by_value.items(), key=lambda item: (-len(item[1]), item[1]))
            told = "; ".join(
                f"process{'es' if len(numbers) > 1 else ''} {_listed(numbers)}: {value}" for value, numbers in others
            )
            problems.append(
                f"{key}: {told}; the other{'s' if len(common[1]) > 1 else ''} ({_listed(common[1])}): {common[0]}"
            )
    return problems


def _numbered(prefix: str) -> dict[int, str]:
    """The values below a key by the number at the end of their keys."""
    try:
        found = _client().key_value_dir_get(prefix)
    except RuntimeError:
        return {}
    return {int(key.rsplit("/", 1)[1]): value for key, value in found}


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(str(number) for number in numbers[:16])
    return f"{shown} and {len(numbers) - 16} more" if len(numbers) > 16 else shown


class _Listener:
    """A thread that looks for messages of other processes in the key-value store.

    It sleeps between looks rather than blocking in the store: a thread that the end of the interpreter finds inside
    C++ code makes the process abort.
    """

    def __init__(self, client: Any):
        import atexit

        self._client, self._seen = client, set()
        self._closed = threading.Event()
        # With a thousand processes process 0 answers a thousand times per second.
        self._interval = max(0.25, count() / 1000)
        self._thread = threading.Thread(target=self._run, name="processes", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(self._interval):
            try:
                found = self._client.key_value_dir_get(_EVENTS)
            except RuntimeError:
                continue
            for key, text in found:
                name = key.rsplit("/", 1)[1]
                if name not in self._seen and name in _subscribers:
                    self._seen.add(name)
                    _subscribers[name](json.loads(text))


_listener: _Listener | None = None
_subscribers: dict[str, Callable[[dict[str, Any]], None]] = {}


def announce(event: str, message: dict[str, Any]) -> None:
    """Tell all processes, this one too, about an event; the first announcement of an event counts."""
    with contextlib.suppress(RuntimeError):  # already announced by another process, or the store is gone
        _client().key_value_set(f"{_EVENTS}/{event}", json.dumps(message))


def announced(event: str) -> dict[str, Any] | None:
    """The message of an event that a process has announced, or None."""
    try:
        return json.loads(_client().key_value_try_get(f"{_EVENTS}/{event}"))
    except RuntimeError:
        return None


def note(name: str, text: str = "", *, overwrite: bool = False) -> None:
    """Leave a note of this process in the key-value store, for `notes`; nothing happens if the store is gone."""
    with contextlib.suppress(RuntimeError):
        _client().key_value_set(f"jvgen/notes/{name}/{index()}", text, allow_overwrite=overwrite)


def remove_note(name: str) -> None:
    """Remove a note of this process that nobody reads any more."""
    with contextlib.suppress(RuntimeError):
        _client().key_value_delete(f"jvgen/notes/{name}/{index()}")


def notes(name: str) -> dict[int, str]:
    """The notes of all processes that have left one, by process."""
    return _numbered(f"jvgen/notes/{name}")


def subscribe(event: str, function: Callable[[dict[str, Any]], None]) -> None:
    """Have a function called once, on another thread, when any process announces an event."""
    _subscribers[event] = function
