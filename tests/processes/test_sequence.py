"""Two processes that share the tokens of a sequence, in every way, forward and backward."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_processes_attend_to_a_sequence_that_they_share():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, str(Path(__file__).with_name("sequence.py")), port]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    running = [subprocess.Popen([*command, n], env=environment, stdout=subprocess.PIPE, text=True) for n in "01"]
    for process in running:
        lines = [line.split() for line in process.communicate(timeout=300)[0].splitlines()]
        found = {line[0]: float(line[1]) for line in lines if line and line[0] in ("gather", "ulysses", "ring")}
        assert process.returncode == 0 and set(found) == {"gather", "ulysses", "ring"}
        assert max(found.values()) < 2e-5
