"""The table of exit codes: what the documentation says, and the configurable restart code."""

import importlib
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jvgen import exit_codes
from jvgen.parallel import failing

PAGE = Path(__file__).parents[2] / "docs" / "resume.md"


def test_the_documentation_has_the_table():
    assert exit_codes.markdown() in PAGE.read_text()
    listed = ", ".join(str(code) for code in exit_codes.NO_RESTART[:-1])
    assert f"except {listed} and {exit_codes.NO_RESTART[-1]}" in PAGE.read_text()


def test_codes_and_names_are_unique():
    assert len({row.code for row in exit_codes.TABLE}) == len({row.name for row in exit_codes.TABLE}) == 9


def test_the_restart_code_can_be_changed(monkeypatch):
    monkeypatch.delenv("JVGEN_RESTART_CODE", raising=False)
    assert exit_codes.restart_code() == 75
    monkeypatch.setenv("JVGEN_RESTART_CODE", "42")
    assert exit_codes.restart_code() == 42


@pytest.mark.parametrize("text", ["0", "2", "74", "256", "-1", "x", "1", "4_2"])
def test_a_restart_code_that_means_something_else_is_refused(monkeypatch, text):
    monkeypatch.setenv("JVGEN_RESTART_CODE", text)
    with pytest.raises(ValueError, match=rf"JVGEN_RESTART_CODE = '{text}'.*other than 0, 1, 2, 65, 74"):
        exit_codes.restart_code()


def test_a_missing_extra_is_a_users_mistake_and_a_broken_import_is_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    monkeypatch.delitem(sys.modules, "jvgen.control.scene_environment", raising=False)
    with pytest.raises(ImportError, match=r"needs gymnasium: install jvgen\[control\]") as missing:
        importlib.import_module("jvgen.control.scene_environment")
    assert exit_codes.of_error(missing.value) == exit_codes.USER_ERROR
    with pytest.raises(ImportError) as broken:
        importlib.import_module("jvgen.no_such_module")
    assert exit_codes.of_error(broken.value) == exit_codes.ERROR


def test_a_value_error_is_a_users_mistake_if_jvgen_raises_it():
    """In every process of a run, not only where the command shows it; libraries raise it for programs."""

    def code_of(function) -> int:
        try:
            function()
        except ValueError as error:
            return exit_codes.of_error(error)
        raise AssertionError("nothing was raised")

    assert code_of(lambda: exit_codes.parse_restart_code("x", "--restart-code")) == exit_codes.USER_ERROR
    assert code_of(lambda: np.zeros(3).reshape(2, 2)) == exit_codes.ERROR
    assert code_of(lambda: int("x")) == exit_codes.ERROR


# As XLA, NCCL and gloo say that another process is gone.
LOST = (
    "UNAVAILABLE: connection to the coordinator is lost",
    "[Rank 3] Gloo all-reduce failed: Connection closed by peer",
    "INTERNAL: NCCL operation ncclGroupEnd() failed: unhandled system error (run with NCCL_DEBUG=INFO for details). "
    "Last NCCL warning(error) log entry (may be unrelated) 'NET/IB : Got completion with error 12'",
    "INTERNAL: NCCL operation async_err failed: remote process exited or there was a network error",
)


@pytest.mark.parametrize("message", LOST)
def test_a_collective_that_fails_because_a_machine_is_gone_asks_for_a_restart(monkeypatch, message):
    error = jax.errors.JaxRuntimeError(message)
    assert failing.code_of(error) == exit_codes.ERROR, "of one process"
    monkeypatch.setattr(failing, "count", lambda: 2)
    assert failing.code_of(error) == exit_codes.restart_code()
    assert failing.code_of(jax.errors.JaxRuntimeError("INTERNAL: NCCL operation failed: invalid argument")) == 1


@pytest.mark.parametrize(
    "words, restart",
    [
        ("CUDA_ERROR_ECC_UNCORRECTABLE: uncorrectable ECC error encountered", True),
        ("CUDA_ERROR_NVLINK_UNCORRECTABLE: uncorrectable NVLink error detected during the execution", True),
        ("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered", False),
    ],
)
def test_a_chip_that_failed_asks_for_a_restart(words, restart):
    """Of one process too: the run is not at fault, and a launcher may give it another machine."""
    error = jax.errors.JaxRuntimeError(f"INTERNAL: Failed to launch kernel: {words}")
    assert exit_codes.of_error(error) == (exit_codes.restart_code() if restart else exit_codes.ERROR)
    assert exit_codes.of_error(ValueError(words)) != exit_codes.restart_code()
