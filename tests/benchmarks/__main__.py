"""The command: run benchmarks by name, print a table each, write everything as JSON."""

import argparse
import importlib
import json
import os
import sys
from pathlib import Path

from tests.benchmarks import machine
from tests.benchmarks.report import Printer

# Name -> module with `run(settings) -> Result`.
BENCHMARKS = {
    "dit_step": "dit_step",
    "image_vae_step": "image_vae_step",
    "cv_vae": "cv_vae",
    "data": "data_pipeline",
    "checkpoint": "checkpoint_stall",
    "memory": "step_memory",
    "world_rollout": "world_rollout",
    "imagination": "imagination",
    "repvideo": "repvideo",
    "epipolar": "epipolar",
}
# Takes minutes and runs only when named.
ON_REQUEST = {
    "data_index": "data_index",
    "data_build": "data_build",
    "latents": "latents",
    "cached_clips": "cached_clips",
    "scene_cuts": "scene_cuts",
    "memory_tpu": "step_memory_tpu",
    "muon_tpu": "muon_tpu",
    "repvideo_tpu": "repvideo_tpu",
    "epipolar_tpu": "epipolar_tpu",
    "splash_tpu": "splash_tpu",
    "wan_tpu": "wan_tpu",
    "language_model_tpu": "language_model_tpu",
    "growth": "growth",
    "group_norm_tpu": "group_norm_tpu",
    "cv_vae_memory": "cv_vae_memory",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmarks that were named, or all but those on request; returns the exit status."""
    known = {**BENCHMARKS, **ON_REQUEST}
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description="Timings of jvgen against PyTorch on the same cores, as ratios."
    )
    which = f"which of {', '.join(known)}; default: all but {' and '.join(ON_REQUEST)}"
    parser.add_argument("names", nargs="*", metavar="NAME", help=which)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs, measures nothing")
    parser.add_argument("--cores", type=int, help="cores for both sides (default: all that this process may use)")
    parser.add_argument("--repeats", type=int, help="rounds of the timed benchmarks (default 9, with --quick 2)")
    parser.add_argument("--avx2", action="store_true", help="keep both sides to AVX2 where the processor has AVX-512")
    parser.add_argument("--topology", default="v5e:16x16", help="of the TPU compilations (default %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    chosen = parser.parse_args(arguments)
    unknown = [name for name in chosen.names if name not in known]
    if unknown:
        parser.error(f"{unknown[0]!r} is no benchmark; they are {', '.join(known)}")
    if chosen.cores is not None and not 1 <= chosen.cores <= len(machine.usable_cores()):
        parser.error(f"--cores {chosen.cores}: this process may use {len(machine.usable_cores())}")

    cores = machine.hold_to_cores(chosen.cores)
    if chosen.avx2:
        machine.hold_to_avx2()
    # Read by JAX and by PyTorch when they are imported, which is below.
    os.environ["OMP_NUM_THREADS"] = str(cores)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    settings = {
        "cores": cores,
        "quick": chosen.quick,
        "repeats": chosen.repeats or (2 if chosen.quick else 9),
        "topology": chosen.topology,
    }
    command = " ".join(["python -m tests.benchmarks", *(sys.argv[1:] if arguments is None else arguments)])
    printer = Printer()
    document = {"command": command, "quick": chosen.quick, "machine": machine.describe(cores), "benchmarks": {}}
    printer.header(document)
    for name in chosen.names or BENCHMARKS:
        before = os.getloadavg()[0]
        module = importlib.import_module(f"tests.benchmarks.{known[name]}")
        result = module.run(machine.Settings(**settings))
        result.load_average = (before, os.getloadavg()[0])
        document["benchmarks"][name] = result.as_json()
        printer.result(name, result)
        if chosen.out is not None:
            # After each one: what was measured is not lost with what comes later.
            chosen.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
