"""The table of compiled programs as Markdown: docs/pods.md."""

from typing import Any

from jvgen.parallel.pods import SLICES, pod_named
from tests.pods import configs
from tests.pods.runs import ROOT, RUNS, PodRun

PAGE = ROOT / "docs" / "pods.md"
# Rows of a step's parts and of its collectives.
LARGEST, LARGEST_COLLECTIVES = 6, 2


def page(found: dict[str, Any]) -> str:
    """The page of what was found, as `results` gives it."""
    lines = [
        "# Pods, as compiled",
        "",
        "Every config for pods on its slices, by XLA's TPU compiler: memory, FLOPs and bytes are those of the",
        "compiled step, times are estimated from it as `jvgen estimate` says, and nothing ran. Per device, which",
        "is a chip on all but tpu7x: GiB in use at most, TFLOP of trained networks without padding and",
        "recomputation, GiB in collectives. Seconds per step and MFU are likely values with the range of the",
        "estimate. `make aot` compiles what is missing and writes this page; `make aot AOT=--again` compiles all",
        "again. Layers are loops of the compiled program, so that all are in it at the cost of one: nothing is",
        "extrapolated from fewer. Rows with times of at least so much are of XLA's optimized program, without",
        "machine code, which the compiler takes half an hour to generate for large convolutions. A row is of the",
        "config as it was when it was compiled; the last column says what of it changed since.",
        "",
        "| config | slice | chips | batch | GiB of HBM | TFLOP | GiB sent | s/step | MFU | date, commit, versions |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in RUNS:
        pod = pod_named(run.topology)
        name = SLICES[pod.chip.name].name_of(pod.chips)
        head = f"| `{_config(run)}` | `{run.topology}`" + (f" ({name})" if name else "")
        rows = found.get(run.name, {})
        if not rows:
            lines.append(f"{head} | {pod.chips} | | | | | | | not compiled |")
        for bucket, row in rows.items():
            cells = [
                f"{bucket} x {row['batch_size']}",
                _memory(row),
                _cell(row.get("useful_TFLOP")),
                f"{row['sent_GiB']:.2f}",
            ]
            if row.get("has_code", True):
                # Without the kernels whose cycles are not known.
                more = "more than " if None in row.get("mfu", ()) else ""
                cells += [more + _range(row.get("seconds"), 1, ""), _range(row.get("mfu"), 100, "%")]
            else:
                cells += [f"at least {min(row['seconds']):.3g}", f"at most {100 * max(row['mfu']):.3g}%"]
            cells.append(f"{row['date']}, {row['commit']}, {row['versions']}{configs.since(run, row)}")
            lines.append(" | ".join((f"{head} | {pod.chips}", *cells)) + " |")
    return "\n".join([*lines, *_parts(found)]) + "\n"


def _parts(found: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "## Where the time goes",
        "",
        f"The {LARGEST} parts that take longest, likely milliseconds per step, and the collectives that others hide",
        "least. `jvgen compile` prints all parts with their ranges. The first rows kept the sum only.",
        "",
        "| config | slice | batch | ms/step by part | collectives: time per step that nothing hides, of all; sent |",
        "|---|---|---|---|---|",
    ]
    for run in RUNS:
        for bucket, row in found.get(run.name, {}).items():
            if "parts_ms" not in row:
                continue
            parts = sorted(row["parts_ms"].items(), key=lambda item: -item[1])[:LARGEST]
            sent = sorted(row["collectives_ms"].items(), key=lambda item: item[1]["hidden_ms"] - item[1]["ms"])
            cells = [
                f"`{_config(run)}`",
                f"`{run.topology}`",
                f"{bucket} x {row['batch_size']}",
                "; ".join(f"{name}: {value:.3g}" for name, value in parts),
                "; ".join(
                    f"{name}: {one['ms'] - one['hidden_ms']:.3g} of {one['ms']:.3g} ms, {one['GiB']:.3g} GiB"
                    for name, one in sent[:LARGEST_COLLECTIVES]
                ),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _config(run: PodRun) -> str:
    return " --set ".join((run.config.removeprefix("configs/"), *run.overrides))


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _memory(row: dict[str, Any]) -> str:
    return "does not fit" if row["memory_GiB"] is None else f"{row['memory_GiB']:.2f} of {row['hbm_GiB']:.2f}"


def _range(values: list[float | None] | None, factor: float, unit: str) -> str:
    if values is None or None in values:
        return "not known"
    low, likely, high = (value * factor for value in (min(values), sorted(values)[1], max(values)))
    return f"{likely:.3g}{unit} ({low:.3g} to {high:.3g})"
