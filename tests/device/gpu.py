"""Everything that is checked and measured on one GPU, in one call of under eight minutes.

    python -m tests.device.gpu --out gpu.json

Each section (`tests/device/sections.py`) is a process of its own with a limit in seconds, so that one that fails, hangs
or runs out of memory ends none of the others; what it measured before that is kept. Writes a JSON file and, beside it,
the same as Markdown tables. `--tiny` runs all sections at toy sizes, on a CPU too: it shows that they run.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.benchmarks import machine

# Seconds of each section, its start and compilations included, by importance: the last ones go without if time is up.
SECTIONS = {
    "parity": 75,
    "step_256_ours": 70,
    "step_256_theirs": 70,
    "step_480_ours": 80,
    "step_480_theirs": 90,
    "vae": 75,
    "rollout": 60,
    "sampling": 75,
}
TOTAL = 470
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "torch",
    "diffusers",
    "transformers",
    "triton",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections that were named; returns 0 if none failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.device.gpu", description="Checks and timings on one GPU, beside PyTorch on the same card."
    )
    parser.add_argument("names", nargs="*", metavar="SECTION", help=f"which of {', '.join(SECTIONS)} (default all)")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="JSON file; Markdown goes beside it")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, for any backend: shows that everything runs")
    parser.add_argument(
        "--seconds", type=float, default=TOTAL, help="for all; limits grow with it (default %(default)s)"
    )
    parser.add_argument("--section", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    unknown = [name for name in chosen.names if name not in SECTIONS]
    if unknown:
        parser.error(f"{unknown[0]!r} is no section; they are {', '.join(SECTIONS)}")
    if chosen.section is not None:
        from tests.device import sections

        sections.run(chosen.section, chosen.out, tiny=chosen.tiny)
        return 0
    document = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": " ".join(["python -m tests.device.gpu", *(sys.argv[1:] if arguments is None else arguments)]),
        "tiny": chosen.tiny,
        "card": _card(),
        "versions": {name: machine.version(name) for name in PACKAGES},
        "sections": {},
    }
    ends, longer = time.monotonic() + chosen.seconds, chosen.seconds / TOTAL
    for name in chosen.names or SECTIONS:
        result = _run(name, chosen.out, min(SECTIONS[name] * longer, ends - time.monotonic()), chosen.tiny)
        document["sections"][name] = result
        print(f"[{name}] {result['state']}, {result['seconds']:.0f} s", flush=True)
        if result["error"]:
            print(result["error"], flush=True)
        # After each: what was measured is not lost with what comes later.
        chosen.out.write_text(json.dumps(document, indent=1) + "\n")
        chosen.out.with_suffix(".md").write_text(markdown(document))
    print(markdown(document))
    return 0 if all(result["state"] == "done" for result in document["sections"].values()) else 1


def _run(name: str, out: Path, limit: float, tiny: bool) -> dict:
    """One section in a process of its own: its rows, and what became of it."""
    rows, log = out.with_suffix(f".{name}.jsonl"), out.with_suffix(f".{name}.log")
    rows.unlink(missing_ok=True)
    if limit < 10:
        return {"state": "not run: no time left", "seconds": 0.0, "rows": [], "error": ""}
    command = [sys.executable, "-m", "tests.device.gpu", "--section", name, "--out", str(rows), *["--tiny"] * tiny]
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONUNBUFFERED": "1"}
    began = time.monotonic()
    with log.open("w") as file:
        try:
            status = subprocess.run(
                command, env=environment | os.environ, stdout=file, stderr=subprocess.STDOUT, timeout=limit
            ).returncode
            state = "done" if status == 0 else f"failed with exit status {status}"
        except subprocess.TimeoutExpired:
            state = f"stopped at its limit of {limit:.0f} s"
    measured = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    rows.unlink(missing_ok=True)
    error = "" if state == "done" else "\n".join(log.read_text(errors="replace").splitlines()[-12:])
    failed = [row for row in measured if row.get("failed")]
    if state == "done" and failed:
        state, error = "failed", "\n".join(f"{row['case']}: {row['failed']}" for row in failed)
    return {"state": state, "seconds": time.monotonic() - began, "rows": measured, "error": error}


def _card() -> str:
    """Name, memory and driver of the first GPU."""
    query = [
        "nvidia-smi",
        "--query-gpu=name,memory.total,driver_version,clocks.max.sm,power.limit",
        "--format=csv,noheader",
    ]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return "no nvidia-smi"
    return found.stdout.splitlines()[0] if found.returncode == 0 and found.stdout else "no GPU"


def markdown(document: Mapping) -> str:
    """The document as tables, one per section."""
    versions = ", ".join(f"{name} {value}" for name, value in document["versions"].items() if value != "not installed")
    lines = [f"`{document['command']}`, {document['time']}", "", f"{document['card']}; {versions}"]
    if document["tiny"]:
        lines += ["", "Toy sizes: nothing here is a measurement."]
    for name, result in document["sections"].items():
        lines += ["", f"## {name}: {result['state']}, {result['seconds']:.0f} s", ""]
        columns = list(dict.fromkeys(key for row in result["rows"] for key in row))
        if columns:
            lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        lines += [f"| {' | '.join(_shown(row.get(key, '')) for key in columns)} |" for row in result["rows"]]
        if result["error"]:
            lines += ["", *(f"    {line}" for line in result["error"].splitlines())]
    return "\n".join(lines) + "\n"


def _shown(value: object) -> str:
    shown = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
    return shown.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main())
