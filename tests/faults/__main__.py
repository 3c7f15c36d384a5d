"""Kill, stop and damage tiny real runs; print a table; fail if anything was lost, silent or a crash.

python -m tests.faults --workdir build/faults --out build/faults.md
"""

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.faults.kills import Kills, Outcome

KINDS = ("kills", "two_processes", "stops", "checkpoints", "data")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("build/faults"), help="folder for runs and data")
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    parser.add_argument("--only", choices=KINDS, action="append", help="a part of the campaign (repeatable)")
    parser.add_argument("--kills", type=int, default=40, help="SIGKILLs of runs of one process")
    parser.add_argument(
        "--pairs", type=int, default=12, help="SIGKILLs, and as many SIGTERMs, in runs of two processes"
    )
    parser.add_argument("--stops", type=int, default=12, help="SIGTERMs to runs of one process")
    parser.add_argument("--damages", type=int, default=33, help="damages of a checkpoint, of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args()
    parsed.workdir.mkdir(parents=True, exist_ok=True)
    rows, failures = ["| fault | trials | results | slowest end |", "|---|---|---|---|"], []
    began = time.monotonic()
    for outcome in campaign(parsed):
        results = ", ".join(f"{count} {result}" for result, count in sorted(outcome.results.items()))
        slowest = f"{outcome.slowest:.1f} s" if outcome.slowest else ""
        rows.append(f"| {outcome.what} | {outcome.trials} | {results} | {slowest} |")
        failures += [f"{outcome.what}: {failure}" for failure in outcome.failures]
        print(rows[-1], *outcome.failures, sep="\n", flush=True)
    print(f"{time.monotonic() - began:.0f} s, {len(failures)} failures")
    if parsed.out is not None:
        parsed.out.write_text("\n".join(rows) + "\n")
    return 1 if failures else 0


def campaign(parsed: argparse.Namespace) -> Iterator[Outcome]:
    """Run the chosen parts, one outcome at a time."""
    chosen = parsed.only or KINDS
    kills = Kills(parsed.workdir.absolute(), parsed.seed)
    kills.prepare((1, 2) if "two_processes" in chosen else (1,))
    if "kills" in chosen:
        yield kills.signals(signal.SIGKILL, parsed.kills, processes=1, limit=5)
    if "stops" in chosen:
        yield kills.signals(signal.SIGTERM, parsed.stops, processes=1, limit=30)
    if "two_processes" in chosen:
        yield kills.signals(signal.SIGKILL, parsed.pairs, processes=2, limit=130)
        yield kills.signals(signal.SIGTERM, parsed.pairs, processes=2, limit=60)
    if "checkpoints" in chosen:
        yield from checkpoint_damages(kills, parsed)
    if "data" in chosen:
        yield from data_damages(kills, parsed)


def checkpoint_damages(kills: Kills, parsed: argparse.Namespace) -> Iterator[Outcome]:
    from tests.faults import damages

    run = kills.undisturbed[1]
    reader = damages.CheckpointReader(run, kills.data)
    yield from damages.trials("checkpoint", run, reader.files, reader.read, parsed.damages, parsed.seed)


def data_damages(kills: Kills, parsed: argparse.Namespace) -> Iterator[Outcome]:
    from tests.faults import damages

    reader, count = damages.DataReader(kills.data), max(1, parsed.damages // 3)
    yield from damages.trials("data shard", kills.data, reader.shards, reader.read, count, parsed.seed)
    yield from damages.trials("data documents", kills.data, reader.documents, reader.read, count, parsed.seed)


if __name__ == "__main__":
    sys.exit(main())
