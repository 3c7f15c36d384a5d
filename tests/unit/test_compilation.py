"""Compilation: the persistent cache, the current stage before the first step, later stages while training."""

import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import toys  # noqa: E402

from jvgen import exit_codes  # noqa: E402
from jvgen.nn import attention, kernel_check, kernel_report  # noqa: E402
from jvgen.nn.kernel_check import KernelDiffers  # noqa: E402
from jvgen.nn.kernel_report import Call  # noqa: E402
from jvgen.parallel.mesh import make_mesh  # noqa: E402
from jvgen.preflight import check as preflight  # noqa: E402
from jvgen.training import compilation, session  # noqa: E402
from jvgen.training.compilation import Programs, persistent_cache  # noqa: E402
from jvgen.training.loop import train  # noqa: E402
from jvgen.training.program import Program  # noqa: E402


@pytest.fixture(autouse=True)
def no_configured_cache(monkeypatch):
    """As a user's process: no cache is configured, and one device."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(session, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-cache"))


def test_a_run_keeps_its_programs_and_the_next_start_reads_them(tmp_path, capfd, monkeypatch):
    # A fast machine compiles the smallest of the programs in less than what is worth keeping.
    monkeypatch.setattr(compilation, "MIN_COMPILE_SECONDS", 0.0)
    experiment = toys.experiment(**{"training.evaluate_every": 2, "training.evaluation_batches": 2})
    assert train(experiment, tmp_path, stop_after=1, make_loader=toys.FakeLoader) == exit_codes.DONE
    # Two steps, and "evaluate" for the two buckets of the evaluation batches.
    assert "compiled 4 programs" in (out := capfd.readouterr().out) and "0 from the cache" in out
    assert entries(tmp_path / "compiled")
    # Not the programs that this process has in memory.
    jax.clear_caches()
    assert train(experiment, tmp_path, stop_after=2, make_loader=toys.FakeLoader) == exit_codes.DONE
    out = capfd.readouterr().out
    assert f"4 from the cache {tmp_path / 'compiled'}" in out and "s (from the cache)" in out
    assert jax.config.jax_compilation_cache_dir is None, "the setting of the process is restored"


def test_an_entry_that_a_killed_run_left_incomplete_is_removed(tmp_path):
    def compile_one() -> list[str]:
        lines: list[str] = []
        jax.clear_caches()
        with persistent_cache(tmp_path, tmp_path / "unused", lines.append):
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            jax.jit(lambda x: jnp.sin(x) + 7)(jnp.ones(3)).block_until_ready()
        return lines

    assert compile_one() == []
    broken = max(entries(tmp_path), key=lambda path: path.stat().st_size)
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    (line,) = compile_one()
    assert broken.name in line and "incomplete" in line
    assert len(broken.read_bytes()) > len(whole) // 2, "compiled and written again"
    assert compile_one() == []


def test_a_configured_cache_is_used_and_a_given_one_comes_first(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "configured"))
    with persistent_cache(None, tmp_path / "default", print) as folder:
        assert folder == tmp_path / "configured"
    with persistent_cache(tmp_path / "given", tmp_path / "default", print) as folder:
        assert folder == tmp_path / "given" and jax.config.jax_compilation_cache_dir == str(folder)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "configured")


class Held:
    """Stands for `Program`: counts what is lowered; the bucket of four frames waits for `release`, that of 3 fails."""

    def __init__(self, experiment):
        self.experiment = experiment
        self._program = Program.build(experiment, make_mesh(experiment.mesh, jax.devices()[:1]))
        self.lowered, self.release = [], threading.Event()
        self.sharding, self.abstract_batch = self._program.sharding, self._program.abstract_batch
        self.active_in = self._program.active_in
        self.noted = {}

    def lower(self, bucket):
        self.lowered.append(bucket.frames)
        if bucket.frames in self.noted:
            kernel_report.note((1, 512, 2, 64), "512 keys", "", self.noted[bucket.frames])
        if bucket.frames == 4:
            self.release.wait()
        if bucket.frames == 3:
            raise RuntimeError("out of memory\nand more")
        return jax.jit(lambda x: x + bucket.frames).lower(jax.ShapeDtypeStruct((), jnp.float32))


def staged(**spans: tuple[int, int | None]):
    """A run with one bucket per entry, NAME_FRAMES=(start step, end step)."""
    base = toys.experiment()
    bucket = base.data.buckets[0]
    buckets = tuple(
        bucket.replace(frames=int(name.split("_")[1]), start_step=start, end_step=end)
        for name, (start, end) in spans.items()
    )
    return base.replace(data=base.data.replace(buckets=buckets))


def compiled(held: Held, experiment, start_step: int, log, **options):
    buckets = experiment.data.buckets
    programs = Programs(held, buckets, [], start_step, dict.fromkeys(buckets, {}), log, **options)
    programs.wait(start_step)
    return programs


def test_steps_of_later_stages_are_compiled_while_training_and_past_ones_never():
    experiment = staged(past_1=(0, 5), now_2=(5, None), later_4=(9, None))
    past, now, later = experiment.data.buckets
    held, lines = Held(experiment), []
    programs = compiled(held, experiment, 5, lines.append)
    assert programs.step(now, 0)(jnp.float32(1)) == 3, "training starts while the later step is still being compiled"
    assert 1 not in held.lowered and any("1 steps of later stages" in line for line in lines)
    programs.poll()
    assert not any("x4x" in line for line in lines)
    held.release.set()
    assert programs.step(later, 0)(jnp.float32(1)) == 5, "waits for it"
    programs.poll()
    assert sum("compiled step for 1x4x1x1" in line for line in lines) == 1


def test_a_later_step_that_fails_is_reported_at_once_and_raised_when_needed():
    experiment = staged(now_2=(0, None), later_3=(9, None))
    held, lines = Held(experiment), []
    programs = compiled(held, experiment, 0, lines.append)
    programs._background[0].done.wait()
    programs.poll()
    assert lines[-1] == "ERROR: compiling the step for 1x3x1x1 x 16 failed: RuntimeError: out of memory"
    with pytest.raises(RuntimeError, match="out of memory"):
        programs.step(experiment.data.buckets[1], 0)
    assert len([line for line in lines if "ERROR" in line]) == 1


def test_a_wrong_kernel_of_a_later_step_is_reported_at_once_and_raised_when_needed(monkeypatch):
    call = Call("attention", "flash_tpu", "bfloat16", 64, 512, 512, 512, 0.125)

    def verify(call, log):
        raise KernelDiffers(f"{call}: computes wrong numbers")

    monkeypatch.setattr(kernel_check, "verify", verify)
    experiment = staged(now_2=(0, None), later_1=(9, None))
    held, lines = Held(experiment), []
    held.noted = {1: call}
    programs = compiled(held, experiment, 0, lines.append)
    programs._background[0].done.wait()
    programs.poll()
    now, later = experiment.data.buckets
    assert lines[-1] == f"ERROR: the step for 1x1x1x1 x 16 cannot run: {call}: computes wrong numbers"
    assert programs.step(now, 0)(jnp.float32(1)) == 3
    with pytest.raises(KernelDiffers):
        programs.step(later, 0)


def test_a_failure_in_the_current_stage_names_its_bucket():
    experiment, lines = staged(now_2=(0, None), other_3=(0, None)), []
    with pytest.raises(RuntimeError, match="out of memory"):
        compiled(Held(experiment), experiment, 0, lines.append)
    assert any(line.startswith("ERROR: compiling the step for 1x3x1x1") for line in lines)


def test_the_wait_for_a_compilation_can_be_ended(monkeypatch):
    monkeypatch.setattr(compilation, "POLL_SECONDS", 0.01)
    experiment = staged(now_4=(0, None))
    held = Held(experiment)

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compiled(held, experiment, 0, print, while_waiting=stop)
    held.release.set()


def test_buckets_with_equal_arrays_share_a_step():
    experiment = staged(now_2=(0, None), later_2=(9, None))
    held = Held(experiment)
    programs = compiled(held, experiment, 0, print)
    first, second = experiment.data.buckets
    assert programs.step(first, 0) is programs.step(second, 0) and held.lowered == [2]


def test_the_stage_may_turn_out_to_be_an_earlier_one():
    experiment = staged(early_1=(0, 5), late_2=(5, None))
    early, late = experiment.data.buckets
    held = Held(experiment)
    programs = Programs(held, experiment.data.buckets, [], 7, dict.fromkeys(experiment.data.buckets, {}), print)
    programs.wait(3)
    assert programs.step(early, 0)(jnp.float32(1)) == 2 and programs.step(late, 0)(jnp.float32(1)) == 3
    assert sorted(held.lowered) == [1, 2], "each once"


def test_programs_are_traced_with_the_runs_kernel_of_attention():
    experiment = toys.experiment(**{"training.attention": "chunked"})
    program = Program.build(experiment, make_mesh(experiment.mesh, jax.devices()[:1]))
    seen = []
    with program.tracing():
        seen.append(attention._instead.get())
    assert seen == [attention.AttentionKernel.CHUNKED]
    assert attention._instead.get() is attention.AttentionKernel.AUTO


def traced_step(program):
    bucket = program.experiment.data.buckets[0]
    jax.eval_shape(program.step(bucket), program.abstract_state(), program.abstract_batch(bucket))


@pytest.mark.parametrize("trace", [traced_step, preflight.kernels])
def test_losses_are_traced_with_the_runs_kernel_of_attention(monkeypatch, trace):
    """Else a run that a wrong kernel has ended could not take another one, as the error says."""
    seen, loss = [], toys.ToyTask.loss

    def observed(task, *arguments):
        seen.append(attention._instead.get())
        return loss(task, *arguments)

    monkeypatch.setattr(toys.ToyTask, "loss", observed)
    experiment = toys.experiment(**{"training.attention": "chunked"})
    trace(Program.build(experiment, make_mesh(experiment.mesh, jax.devices()[:1])))
    assert set(seen) == {attention.AttentionKernel.CHUNKED}
    assert attention._instead.get() is attention.AttentionKernel.AUTO
