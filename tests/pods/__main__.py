"""The command of `make aot`: compile what the table does not have yet, one batch shape at a time in its own process."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

from tests.pods import configs
from tests.pods.page import PAGE, page
from tests.pods.runs import RESULTS, ROOT, RUNS, PodRun, results, row_of


def main(arguments: list[str] | None = None) -> int:
    """Compile and write; 1 if a program could not be compiled."""
    parser = argparse.ArgumentParser(prog="python -m tests.pods", description="Compile every config for pods.")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="runs whose name has this text")
    parser.add_argument("--again", action="store_true", help="also what the table has")
    parser.add_argument(
        "--without-code", action="store_true", help="of what is missing, memory and least times, without machine code"
    )
    parser.add_argument("--page", action="store_true", help="write the page only")
    parser.add_argument(
        "--configs-as-compiled", action="store_true",
        help="write the page only, and say that rows without a config were compiled from the configs as they are now",
    )  # fmt: skip
    chosen = parser.parse_args(arguments)
    if chosen.configs_as_compiled:
        _fill()
        chosen.page = True
    failed = 0
    for run in RUNS if not chosen.page else ():
        if chosen.only and not any(text in run.name for text in chosen.only):
            continue
        for bucket in run.experiment().data.buckets:
            row = results().get(run.name, {}).get(bucket.name)
            if row and not chosen.again and (chosen.without_code or row.get("has_code", True)):
                continue
            print(f"{run.name} {bucket.name}", flush=True)
            failed += not _compile(run, bucket.name, not chosen.without_code)
    PAGE.write_text(page(results()))
    return int(failed > 0)


def _compile(run: PodRun, bucket: str, code: bool = True) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        command = [sys.executable, "-m", "jvgen.cli", "compile", run.config, "--topology", run.topology]
        command += [] if code else ["--without-code"]
        command += ["--bucket", bucket, "--json", str(out), *(f"--set={one}" for one in run.overrides)]
        # A described pod needs no other backend, and no search for TPUs.
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.DEVNULL)
        if not out.exists():
            print(f"failed with status {done.returncode}", flush=True)
            return False
        report = json.loads(out.read_text())
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "libtpu"))
    about = {"date": time.strftime("%Y-%m-%d"), "commit": commit, "versions": versions, "config": configs.record(run)}
    found = results()
    for entry in report["buckets"]:
        found.setdefault(run.name, {})[bucket] = row_of(report, entry, about)
    _write(found)
    return True


def _fill() -> None:
    """Give rows without a config that of the files as they are now."""
    found = results()
    for run in RUNS:
        rows = found.get(run.name, {})
        if any("config" not in row for row in rows.values()):
            digest = configs.record(run)
            found[run.name] = {bucket: {"config": digest} | row for bucket, row in rows.items()}
    _write(found)


def _write(found: dict[str, dict]) -> None:
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
