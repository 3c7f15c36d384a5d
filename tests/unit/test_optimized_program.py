"""A step's program without machine code: what another process leaves before it is stopped."""

import os
import sys
from pathlib import Path

import pytest

from jvgen.cli import main as cli
from jvgen.config import ConfigError
from jvgen.preflight import optimized_program, topology
from jvgen.preflight.ahead_of_time import compile_ahead

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))
import toys  # noqa: E402

needs_compiler = pytest.mark.skipif(not topology.has_compiler(), reason="needs libtpu, the TPU compiler")
ASSIGNMENT = """BufferAssignment:
allocation 0: size 512, page 0, thread-local:
 value: <7289 or.1827 @0> (size=512,offset=0): u8[]{:T(512)}
allocation 1: size 4096, page 0, parameter 7, shape |f32[32,32]| at ShapeIndex {}, maybe-live-out:
allocation 2: size 100, page 0, parameter 8, shape |u8[100]| at ShapeIndex {}:
allocation 3: size 8, page 0, maybe-live-out:
allocation 4: size 16, page 0, output shape is |(f32[32,32], f32[])|, maybe-live-out:
allocation 5: size 7, page 0, constant:
allocation 6: size 2000, page 0, preallocated-temp:
allocation 7: size 9999, color 1, page 0, preallocated-temp:
"""


def test_memory_of_a_buffer_assignment():
    memory = optimized_program._memory(ASSIGNMENT)
    assert (memory.arguments, memory.outputs, memory.aliased, memory.temporaries) == (4196, 4120, 4096, 2000)
    assert memory.total == 4096 + 100 + 24 + 2000 and memory.code == memory.peak == 0


def test_why_the_other_process_ended():
    full = optimized_program._failure("a\njax: RESOURCE_EXHAUSTED: 17.9G\nof 15.7G", 1)
    assert isinstance(full, optimized_program.DoesNotFitError) and str(full) == "RESOURCE_EXHAUSTED: 17.9G\nof 15.7G"
    told = str(optimized_program._failure("Traceback\nImportError: no\n", 1))
    assert "ended early with status 1: ImportError: no" in told
    assert "status -9: it printed nothing" in str(optimized_program._failure("", -9))


@needs_compiler
def test_it_is_the_program_that_is_compiled(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(TESTS), str(TESTS.parent))))
    experiment = toys.experiment()
    experiment = experiment.replace(data=experiment.data.replace(buckets=experiment.data.buckets[:1]))
    whole, optimized = (compile_ahead(experiment, "v5e:2x2", code=code) for code in (True, False))
    (expected,), (found,) = whole.buckets, optimized.buckets
    for name in ("arguments", "outputs", "aliased", "temporaries"):
        assert getattr(found.memory, name) == pytest.approx(getattr(expected.memory, name), rel=0.02, abs=2**14), name
    assert found.collectives == expected.collectives
    assert found.time.program_flops == expected.time.program_flops
    assert 0 < found.time.seconds.least <= expected.time.seconds.least * (1 + 1e-6)
    assert expected.time.has_code and expected.reading.basis == "estimated"
    assert not found.time.has_code and found.reading.basis != "estimated"
    assert "s per step, MFU at most" in str(optimized) and "at most" not in str(whole)


@needs_compiler
def test_a_step_that_the_other_process_cannot_build(tmp_path, monkeypatch):
    monkeypatch.setattr(optimized_program.saved_config, "to_json", lambda _: "{}")
    with pytest.raises(ConfigError, match="ended early with status 1: AttributeError: .*mesh"):
        optimized_program.optimize(toys.experiment(), "v5e:2x2", 1, tmp_path)


def test_classes_that_the_config_file_defines(tmp_path, monkeypatch):
    monkeypatch.setattr(
        optimized_program.saved_config, "to_json", lambda _: '{"class": "jvgen_config_mine:Outer.Inner"}'
    )
    with pytest.raises(ConfigError, match="--without-code: mine.py defines config classes of its own"):
        optimized_program.optimize(toys.experiment(), "v5e:2x2", 1, tmp_path)


def test_it_ends_with_the_process_that_waits_for_it(monkeypatch):
    parents, ended = iter((7, 1)), []
    monkeypatch.setattr(optimized_program.os, "getppid", lambda: next(parents))
    monkeypatch.setattr(optimized_program.os, "_exit", ended.append)
    monkeypatch.setattr(optimized_program.time, "sleep", lambda seconds: None)
    optimized_program._end_with(7)
    assert ended == [1]


def test_not_with_a_search(capsys):
    arguments = ["compile", "configs/demo_image_vae.py", "--topology", "v5e:2x2", "--search", "--without-code"]
    assert cli.main(arguments) != 0 and "--without-code: not with --search" in capsys.readouterr().err
