"""Compilation of a run's programs: a persistent cache, the current stage's programs in parallel, later ones in the
background.
"""

import contextlib
import dataclasses
import functools
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from jvgen import storage
from jvgen.data.stream.config import BucketConfig
from jvgen.nn import kernel_check
from jvgen.nn.kernel_report import KernelReport, collecting
from jvgen.parallel import processes
from jvgen.storage import Path
from jvgen.tasks.task import Batch, Metrics
from jvgen.training.program import Program
from jvgen.training.state import TrainState
from jvgen.training.telemetry import startup

Log = Callable[[Any], None]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]

# Folder of the cache in a run directory.
FOLDER = "compiled"
# Programs that compile faster are not written to the cache: reading them would take as long.
MIN_COMPILE_SECONDS = 0.1
# Each compilation of a large program takes several GiB of host memory.
MAX_THREADS = 16
# Seconds between two looks at `while_waiting` while programs are compiled.
POLL_SECONDS = 0.2
# Steps whose sets of active objectives are looked at (`Program.active_in`).
LOOK_AHEAD = 5000
_VERIFIED = "verified"


@contextlib.contextmanager
def persistent_cache(folder: Path | None, default: Path, log: Log) -> Iterator[Path | None]:
    """Context in which compiled programs are kept in a folder and read from it, on all backends.

    Only process 0 writes. Entries that a killed process left incomplete are removed; otherwise their programs would be
    compiled at every start. Whoever can write to the folder can make the run execute code.

    Args:
      folder: created if missing; None for the one that JAX is configured to use (`JAX_COMPILATION_CACHE_DIR`).
      default: the folder if there is neither.

    Yields:
      The folder in use; None if `JAX_ENABLE_COMPILATION_CACHE` is off.
    """
    if not jax.config.jax_enable_compilation_cache:
        log("compilation cache: off (JAX_ENABLE_COMPILATION_CACHE)")
        yield None
        return
    if folder is None and jax.config.jax_compilation_cache_dir is not None:
        yield storage.as_path(jax.config.jax_compilation_cache_dir)
        return
    folder = folder or default
    if processes.index() == 0:
        _remove_incomplete(folder, log)
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": MIN_COMPILE_SECONDS,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    _configure(settings)
    try:
        yield folder
    finally:
        _configure(before)


def _configure(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    # JAX opens its cache once, at the first compilation.
    compilation_cache.reset_cache()


def _remove_incomplete(folder: Path, log: Log) -> None:
    """Remove entries that cannot be decompressed; those that were checked at an earlier start are not read again."""
    if not folder.is_dir():
        return
    marker = folder / _VERIFIED
    known = set(storage.read_text(marker).split()) if marker.exists() else set()
    entries = {path.name: path for path in folder.iterdir() if path.name.endswith("-cache")}
    for name in sorted(entries.keys() - known):
        if not _is_complete(storage.read_bytes(entries[name])):
            entries.pop(name).unlink(missing_ok=True)
            log(f"compilation cache: removed {folder / name}, which an interrupted run left incomplete")
    if entries.keys() != known:
        storage.write_text(marker, "".join(f"{name}\n" for name in sorted(entries)))


def _is_complete(entry: bytes) -> bool:
    """Whether a compressed entry has its end. zlib's own checksum is checked; of zstandard only the frame's header."""
    if entry[:4] == b"\x28\xb5\x2f\xfd":
        return True
    decompressor = zlib.decompressobj()
    try:
        decompressor.decompress(entry)
    except zlib.error:
        return False
    return decompressor.eof


_cache_hits = threading.local()


@functools.cache
def _count_cache_hits() -> None:
    """Start counting, in `_cache_hits`, the programs that each thread reads from the persistent cache."""

    def count(event: str, **unused: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            _cache_hits.count = getattr(_cache_hits, "count", 0) + 1

    jax.monitoring.register_event_listener(count)


@dataclasses.dataclass(eq=False)
class _Job:
    """One program to compile.

    Attributes:
      name: for messages.
      lower: traces it.
      report: lines for the log, given the compiled program.
      kernels: of its attention calls.
      done: set when `compiled` or `error` is.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    report: Callable[["_Job"], list[str]]
    kernels: KernelReport = dataclasses.field(default_factory=KernelReport)
    compiled: jax.stages.Compiled | None = None
    error: BaseException | None = None
    seconds: float = 0.0
    cached: bool = False
    logged: bool = False
    done: threading.Event = dataclasses.field(default_factory=threading.Event)


class Programs:
    """The compiled programs of a run: a training step per bucket, evaluation programs per bucket.

    Making it starts to compile, in parallel and at most one program per CPU core, the training steps of the buckets
    that are active where the run starts, and the evaluation programs. `wait` waits for them. Those of later stages are
    compiled while training, one after the other; a failure there is logged by `poll` and raised when the program is
    needed. Buckets with equal arrays share a program. Only the main thread may call the methods.

    Args:
      program: the run.
      buckets: those of its training data.
      evaluations: (method of the task, bucket of its batches).
      start_step: the step at which training probably starts.
      flops: of the steps, for the log.
      log: takes messages for the user, on the calling thread.
      while_waiting: called on the calling thread about every 0.2 s while it waits; what it raises ends the wait.
    """

    def __init__(
        self,
        program: Program,
        buckets: Sequence[BucketConfig],
        evaluations: Sequence[tuple[str, BucketConfig]],
        start_step: int,
        flops: dict[BucketConfig, dict[str, float]],
        log: Log,
        while_waiting: Callable[[], None] = lambda: None,
    ):
        self._program, self._buckets, self._flops = program, buckets, flops
        self._log, self._while_waiting = log, while_waiting
        self._jit = not jax.config.jax_disable_jit
        # Programs share most kinds of calls: each is logged once.
        self._kernels = KernelReport(lambda line: log(f"kernels: {line}"))
        # Jobs of training steps by the shapes of their batches and the objectives that are active.
        self._by_shapes: dict[tuple[str, tuple[str, ...] | None], _Job] = {}
        self._evaluations: dict[tuple[str, BucketConfig], _Job] = {}
        self._background: list[_Job] = []
        self._start = time.perf_counter()
        if self._jit:
            self._evaluations = {key: _evaluation_job(program, *key) for key in evaluations}
            self._threads = _start_threads([*self._new_jobs(start_step), *self._evaluations.values()])

    def wait(self, start_step: int) -> None:
        """Wait for the programs of the stage in which training starts, and log them.

        Raises:
          Exception: what compilation of one of them raised; the log names the program.
        """
        if not self._jit:
            self._log("JAX_DISABLE_JIT: training steps run op by op, without compilation")
            return
        # Of other steps than those that were started, if the latest checkpoint turned out to be corrupt.
        _start_threads(self._new_jobs(start_step))
        current = [self._job(bucket, start_step) for bucket in self._buckets if _is_active(bucket, start_step)]
        current = [*dict.fromkeys(current), *self._evaluations.values()]
        for job in current:
            self._result(job)
        seconds = time.perf_counter() - self._start
        where = f" {jax.config.jax_compilation_cache_dir}" if jax.config.jax_compilation_cache_dir else ""
        self._log(
            f"compiled {len(current)} programs in {seconds:.1f} s on {self._threads} threads, "
            f"{sum(job.cached for job in current)} from the cache{where}"
        )
        later = sorted((b for b in self._buckets if b.start_step > start_step), key=lambda b: b.start_step)
        self._background = [job for bucket in later for job in self._new_jobs(bucket.start_step)]
        if self._background:
            self._log(f"compiling {len(self._background)} steps of later stages while training")
            _start_threads(self._background, 1)

    def step(self, bucket: BucketConfig, step: int) -> Step:
        """The training step of a bucket; waits for it if it is still being compiled.

        Raises:
          Exception: what its compilation raised.
        """
        return self._result(self._job(bucket, step)) if self._jit else self._program.step(bucket)

    def evaluation(self, method: str, bucket: BucketConfig) -> Callable[..., Any]:
        """A method of the task ("evaluate", "visualize") for batches of a bucket, see `Program.evaluation`."""
        if (method, bucket) not in self._evaluations:
            return self._program.evaluation(method)
        return self._result(self._evaluations[method, bucket])

    def poll(self) -> None:
        """Log what was compiled in the background since the last call, and what failed. It does not wait for more, but
        runs new kernels of what was compiled, which takes seconds."""
        for job in self._background:
            if job.done.is_set() and not job.logged:
                self._log_job(job)
        self._background = [job for job in self._background if not job.logged]

    def _job(self, bucket: BucketConfig, step: int) -> _Job:
        key = (_shapes(self._program, bucket), self._program.active_in(step))
        if key not in self._by_shapes:
            _start_threads(self._new_jobs(step))
        return self._by_shapes[key]

    def _new_jobs(self, step: int) -> list[_Job]:
        """Jobs for the buckets that are active at a step, without those that exist."""
        new = []
        # The first is that of the step itself; the others are needed soon, unless the run ends before.
        end = max(step + 1, min(step + LOOK_AHEAD, self._program.experiment.training.steps))
        sets = dict.fromkeys(self._program.active_in(later) for later in range(step, end))
        for bucket in self._buckets:
            if not _is_active(bucket, step):
                continue
            for only in sets:
                key = (_shapes(self._program, bucket), only)
                if key not in self._by_shapes:
                    self._by_shapes[key] = _step_job(self._program, bucket, self._flops[bucket], only)
                    new.append(self._by_shapes[key])
        return new

    def _result(self, job: _Job) -> Any:
        while not job.done.wait(POLL_SECONDS):
            self._while_waiting()
        if not job.logged:
            self._log_job(job)
        if job.error is not None:
            raise job.error
        return job.compiled

    def _log_job(self, job: _Job) -> None:
        job.logged = True
        for line in job.kernels.lines:
            self._kernels.add(line)
        if job.error is None:
            for line in job.report(job):
                self._log(line)
            self._verify(job)
        else:
            first = (str(job.error).strip().splitlines() or [""])[0]
            self._log(f"ERROR: compiling {job.name} failed: {type(job.error).__name__}: {first}")

    def _verify(self, job: _Job) -> None:
        """Run the kernels of a program before it; a wrong one is an error of the program, as if it did not compile."""
        try:
            for call in job.kernels.calls:
                kernel_check.verify(call, lambda line: self._log(f"kernels: {line}"))
        except kernel_check.KernelDiffers as error:
            job.error = error
            self._log(f"ERROR: {job.name} cannot run: {error}")


def _shapes(program: Program, bucket: BucketConfig) -> str:
    return repr(sorted((n, s.shape, str(s.dtype)) for n, s in program.abstract_batch(bucket).items()))


def _is_active(bucket: BucketConfig, step: int) -> bool:
    return bucket.start_step <= step and (bucket.end_step is None or bucket.end_step > step)


def _step_job(program: Program, bucket: BucketConfig, flops: dict[str, float], only: tuple[str, ...] | None) -> _Job:
    def report(job: _Job) -> list[str]:
        return [
            startup.memory_line(bucket, job.compiled, job.seconds, job.cached),
            startup.flops_line(bucket, flops, program.sharding.mesh.size),
        ]

    name = f"the step for {bucket.name} x {bucket.batch_size}"
    if only is None:
        return _Job(name, lambda: program.lower(bucket), report)
    return _Job(f"{name} of {' and '.join(only) or 'nothing'}", lambda: program.lower(bucket, only), report)


def _evaluation_job(program: Program, method: str, bucket: BucketConfig) -> _Job:
    def report(job: _Job) -> list[str]:
        cached = " (from the cache)" if job.cached else ""
        return [f"compiled {job.name} in {job.seconds:.1f} s{cached}"]

    name = f"{method} for {bucket.name} x {bucket.batch_size}"
    return _Job(name, lambda: program.lower_evaluation(method, bucket), report)


def _cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_threads(jobs: Sequence[_Job], count: int = MAX_THREADS) -> int:
    """Compile jobs in order on at most `count` threads, one per CPU core, which end with the last job.

    Returns:
      Number of threads.
    """
    count = min(len(jobs), count, _cores())
    left = iter(list(jobs))
    next_job, tracing = threading.Lock(), threading.Lock()
    _count_cache_hits()

    def work() -> None:
        while True:
            with next_job:
                job = next(left, None)
            if job is None or not threading.main_thread().is_alive():
                return
            start = time.perf_counter()
            try:
                # Tracing holds the interpreter lock in any case; XLA's compilation releases it.
                with tracing, collecting(job.kernels):
                    lowered = job.lower()
                _cache_hits.count = 0
                job.compiled = lowered.compile()
                job.cached = _cache_hits.count > 0
            except BaseException as error:
                job.error = error
            job.seconds = time.perf_counter() - start
            job.done.set()

    # Not daemons: a process that ends while one of its threads is in XLA aborts with 134, whatever its exit code. They
    # take no new job once the main thread has ended. A process that is asked to stop does not wait for them.
    for number in range(count):
        threading.Thread(target=work, name=f"compile-{number}").start()
    return count
