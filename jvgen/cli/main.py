"""The `jvgen` command: one sub-command a verb, each with its own help; heavy imports wait until a verb needs them."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from jvgen import __version__, config, saved_config
from jvgen.cli.data import add_data_commands
from jvgen.cli.play import add_play_command
from jvgen.cli.sample import add_sample_arguments
from jvgen.cli.vae import add_coding_commands, add_vae_arguments, run_evaluate_vae

DESCRIPTION = "Pretrain video generators at pod scale: train, resume, sample, evaluate, export to PyTorch."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one `jvgen` command; returns its exit status. User mistakes are printed without a traceback, status 2."""
    parser = build_parser()
    parsed = parser.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Orbax warns there of what it was told to do.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        return parsed.handler(parsed) or 0
    except _told() as error:
        if os.environ.get("JVGEN_TRACEBACK"):
            raise
        print(f"jvgen {parsed.command}: {error}", file=sys.stderr)
        print("(set JVGEN_TRACEBACK=1 to see where this was raised)", file=sys.stderr)
        return 2


def _told() -> tuple[type[Exception], ...]:
    """What is told without a traceback: users' mistakes, and damage or disks that no traceback explains.

    Called when something was raised; a module that is not imported by then has raised nothing.
    """
    rooms = {
        "jvgen.training.checkpoint.manager": "CheckpointError",
        "jvgen.data.stream.quarantine": "TooManyFailures",
        "jvgen.demo.demo": "DemoFailed",
    }
    loaded = [getattr(sys.modules[room], name) for room, name in rooms.items() if room in sys.modules]
    return (ValueError, OSError, *loaded)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command, with help for every verb."""
    parser = argparse.ArgumentParser(prog="jvgen", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"jvgen {__version__}")
    verbs = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _train(verbs)
    _sample(verbs)
    _evaluate(verbs)
    _analyse(verbs)
    _export(verbs)
    _import(verbs)
    _verify(verbs)
    _data(verbs)
    _config(verbs)
    _compile(verbs)
    _demo(verbs)
    add_play_command(verbs)
    add_coding_commands(verbs)
    return parser


def _verb(verbs, name: str, summary: str, detail: str = "", example: str = "") -> argparse.ArgumentParser:
    return verbs.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. {detail}".strip(),
        epilog=f"Example: {example}" if example else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="config file: a Python file with experiment()")
    _set_argument(parser)


def _set_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", dest="assignments", action="append", default=[], metavar="PATH=VALUE",
        help="change one field by dotted path, checked against its type (repeatable)",
    )  # fmt: skip


def _run_arguments(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    parser.add_argument(
        "run",
        type=Path,
        nargs="?" if optional else None,
        help="work folder of a run (what `jvgen train --workdir` wrote)",
    )
    parser.add_argument(
        "--ema", default="best", metavar="DECAY|raw|best",
        help="which weights: an EMA decay that the run keeps, `raw`, or `best` for the slowest EMA, else raw",
    )  # fmt: skip
    parser.add_argument("--step", type=int, default=None, help="checkpoint step; the newest sound one if not given")


def _experiment(parsed: argparse.Namespace):
    from jvgen.training.experiment import load_experiment

    return load_experiment(parsed.config, parsed.assignments)


# train ---------------------------------------------------------------------------------------------------------------


def _train(verbs) -> None:
    parser = _verb(
        verbs, "train", "train, or resume training, from a config file",
        "The work folder gets checkpoints, metrics.jsonl and TensorBoard files; the same command resumes it.",
        "jvgen train configs/demo_text_to_video.py --set optimizer.learning_rate=3e-4 --workdir runs/x",
    )  # fmt: skip
    _config_arguments(parser)
    parser.add_argument("--workdir", type=Path, required=True, help="work folder of the run")
    parser.add_argument("--stop-after", type=int, default=None, metavar="STEP", help="save and exit after this step")
    parser.add_argument(
        "--allow-changes", action="store_true", help="resume although the model or data part of the config changed"
    )
    parser.add_argument(
        "--distributed", action="store_true", help="call jax.distributed.initialize() first (several hosts)"
    )
    parser.set_defaults(handler=_run_train)


def _run_train(parsed: argparse.Namespace) -> int:
    from jvgen.preflight.check import check
    from jvgen.training.loop import train

    experiment = _experiment(parsed)
    if parsed.distributed:
        import jax

        jax.distributed.initialize()
    check(experiment, parsed.workdir)
    return train(experiment, parsed.workdir, stop_after=parsed.stop_after, allow_changes=parsed.allow_changes)


# sample, evaluate ----------------------------------------------------------------------------------------------------


def _sample(verbs) -> None:
    parser = _verb(
        verbs, "sample", "generate clips from prompts, with a trained run or with published weights",
        "Give a run's work folder, or --weights with the folder of a CogVideoX pipeline as diffusers saves it. Clips "
        "that are in --out already are not made again.",
        'jvgen sample --weights CogVideoX-2b --prompt "a red ball rolls" --frames 49 --size 480x720 --out clip.mp4',
    )  # fmt: skip
    _run_arguments(parser, optional=True)
    add_sample_arguments(parser)


def _evaluate(verbs) -> None:
    parser = _verb(
        verbs, "evaluate", "measure a trained run, or an exported VAE, on held-out data",
        "Prints the task's metrics (reconstruction PSNR and SSIM, loss by timestep band, ...) and writes them as JSON. "
        "With --vae: fidelity of its reconstructions and, with --image-vae, how they read each other's latents.",
        "jvgen evaluate runs/demo/image_vae --batches 8",
    )  # fmt: skip
    _run_arguments(parser, optional=True)
    parser.add_argument("--data", default=None, help="data set folder; the run's evaluation sources if not given")
    parser.add_argument("--batches", type=int, default=16, help="batches to average over")
    parser.add_argument("--untrained", action="store_true", help="random weights instead, as a baseline")
    parser.add_argument(
        "--fvd-weights", type=Path, default=None,
        help="I3D weights (.safetensors): also the Fréchet video distance, of a world model's or a VAE's clips",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=None, help="JSON file; with --vae a folder, for worst clips too")
    add_vae_arguments(parser)
    parser.set_defaults(handler=_run_evaluate)


def _run_evaluate(parsed: argparse.Namespace) -> int:
    if (parsed.run is None) == (parsed.vae is None):
        raise ValueError("evaluate either a run (its work folder) or an exported VAE (--vae FOLDER).")
    if parsed.vae is not None:
        return run_evaluate_vae(parsed)
    from jvgen.runs.evaluation import evaluate_run

    evaluate_run(
        parsed.run, ema=parsed.ema, step=parsed.step, data=parsed.data, batches=parsed.batches, out=parsed.out,
        untrained=parsed.untrained, fvd_weights=parsed.fvd_weights,
    )  # fmt: skip
    return 0


def _analyse(verbs) -> None:
    parser = _verb(
        verbs, "analyse", "look at what the layers of a trained video DiT do",
        "Writes analysis.json and pictures: attention by layer, and how neighbouring frames agree by layer.",
        "jvgen analyse runs/demo/text_to_video --out runs/demo/analysis",
    )  # fmt: skip
    _run_arguments(parser)
    parser.add_argument("--data", default=None, help="data set folder; the run's evaluation sources if not given")
    parser.add_argument("--timesteps", default="900,600,300,50", help="noise levels, raw timesteps 0..999")
    parser.add_argument("--batches", type=int, default=1, help="held-out batches to average over")
    parser.add_argument("--untrained", action="store_true", help="random weights instead, as a baseline")
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.set_defaults(handler=_run_analyse)


def _run_analyse(parsed: argparse.Namespace) -> int:
    from jvgen.runs.analysis import analyze_run

    try:
        timesteps = [float(word) for word in parsed.timesteps.split(",")]
    except ValueError as error:
        raise ValueError(f"--timesteps {parsed.timesteps}: numbers with commas between, as 900,50.") from error
    analyze_run(
        parsed.run, parsed.out, ema=parsed.ema, step=parsed.step, data=parsed.data, timesteps=timesteps,
        batches=parsed.batches, untrained=parsed.untrained,
    )  # fmt: skip
    return 0


# PyTorch -------------------------------------------------------------------------------------------------------------


def _export(verbs) -> None:
    parser = _verb(
        verbs, "export", "write a run's weights as a folder that diffusers or transformers loads",
        example="jvgen export runs/demo/text_to_video --ema 0.999 --to exported",
    )  # fmt: skip
    _run_arguments(parser)
    parser.add_argument("--to", type=Path, required=True, help="folder to write, one sub-folder a network")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the file")
    parser.add_argument(
        "--layout", choices=["folders", "sat"], default="folders",
        help="sat: the denoiser alone, with the names of the code that CogVideoX and RepVideo were trained in",
    )  # fmt: skip
    parser.set_defaults(handler=_run_export)


def _run_export(parsed: argparse.Namespace) -> int:
    from jvgen.runs.exporting import export_run

    export_run(parsed.run, parsed.to, ema=parsed.ema, step=parsed.step, dtype=parsed.dtype, layout=parsed.layout)
    return 0


def _import(verbs) -> None:
    parser = _verb(
        verbs, "import", "read PyTorch weights into a run that `jvgen train` and `jvgen sample` go on from",
        "Reads a local diffusers folder or one .safetensors file. Without --to it prints what the folder holds.",
        "jvgen import CogVideoX-2b/transformer --config configs/cogvideox_2b.py --to runs/from_published",
    )  # fmt: skip
    parser.add_argument(
        "weights",
        type=Path,
        help="diffusers folder (with config.json), a whole CogVideoX pipeline, or .safetensors file",
    )
    parser.add_argument("--config", type=Path, default=None, help="experiment whose network takes the weights")
    _set_argument(parser)
    parser.add_argument("--network", default=None, help="which network of the task; found by its class if not given")
    parser.add_argument(
        "--inflate", action="store_true", help="grow the run's video autoencoder out of an image autoencoder's weights"
    )
    parser.add_argument(
        "--new-gates", action="store_true", help="begin a RepVideo run with CogVideoX's weights: its gates are new"
    )
    parser.add_argument(
        "--adapt", action="store_true", help="iVideoGPT: other context frames, other heads; what is missing is new"
    )
    parser.add_argument("--to", type=Path, default=None, help="work folder to create, with a checkpoint at step 0")
    parser.set_defaults(handler=_run_import)


def _run_import(parsed: argparse.Namespace) -> int:
    from jvgen.runs.exporting import describe_weights, import_run

    if parsed.to is None:
        print(describe_weights(parsed.weights))
        return 0
    if parsed.config is None:
        raise ValueError("--to also needs --config: the experiment whose network takes the weights.")
    import_run(
        parsed.weights, _experiment(parsed), parsed.to, network=parsed.network, inflate=parsed.inflate,
        new_gates=parsed.new_gates, adapt=parsed.adapt,
    )  # fmt: skip
    return 0


def _verify(verbs) -> None:
    parser = _verb(
        verbs, "verify", "load an exported folder with the original PyTorch class and compare outputs",
        "Needs the `torch` extra. Prints the largest absolute difference; fails above --tolerance.",
        "jvgen verify exported/denoiser",
    )  # fmt: skip
    parser.add_argument("folder", type=Path, help="one network's exported folder")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest absolute difference that passes")
    parser.set_defaults(handler=_run_verify)


def _run_verify(parsed: argparse.Namespace) -> int:
    from jvgen.interop.from_torch import import_folder
    from jvgen.interop.verify import verify

    network_config, parameters = import_folder(parsed.folder)
    report = verify(parsed.folder, network_config, parameters)
    print(report)
    return 0 if report.max_abs_error <= parsed.tolerance else 1


# data ----------------------------------------------------------------------------------------------------------------


def _data(verbs) -> None:
    parser = _verb(verbs, "data", "build data sets and look at them", example="jvgen data show data/scenes")
    add_data_commands(parser)


# config, compile -----------------------------------------------------------------------------------------------------


def _config(verbs) -> None:
    parser = _verb(
        verbs, "config", "look at a config after overrides", example="jvgen config show configs/cogvideox_2b.py"
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = _verb(
        actions, "show", "print every field of a config, one line each",
        example="jvgen config show configs/cogvideox_2b.py --set training.steps=100",
    )  # fmt: skip
    _config_arguments(show)
    show.add_argument("--json", action="store_true", help="as JSON, the form that checkpoints keep")
    show.set_defaults(handler=_run_config_show)


def _run_config_show(parsed: argparse.Namespace) -> int:
    experiment = _experiment(parsed)
    sys.stdout.write(saved_config.to_json(experiment) + "\n" if parsed.json else config.dump(experiment))
    return 0


def _compile(verbs) -> None:
    parser = _verb(
        verbs, "compile", "compile the training step for a TPU pod that this machine does not have",
        "Prints memory per device against HBM, FLOPs by part and the largest collectives. Large networks of 3-D "
        "convolutions take the TPU compiler half an hour a batch shape. Needs the `tpu` extra.",
        "jvgen compile configs/cogvideox_2b.py --topology v5p:4x4x8",
    )  # fmt: skip
    _config_arguments(parser)
    parser.add_argument("--topology", required=True, help="chip and shape: v5e:16x16, v5p:4x4x8, v6e:16x16, ...")
    parser.add_argument("--json", type=Path, default=None, help="also write the report as JSON, after every shape")
    parser.set_defaults(handler=_run_compile)


def _run_compile(parsed: argparse.Namespace) -> int:
    from jvgen.preflight.ahead_of_time import CompileReport, compile_ahead

    experiment = _experiment(parsed)
    if parsed.json:
        # Before half an hour of compiling, not after.
        if parsed.json.is_dir():
            raise ValueError(f"--json {parsed.json}: this is a folder; name a file.")
        try:
            parsed.json.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--json {parsed.json}: its folder cannot be made ({error}).") from error

    def each(report: CompileReport) -> None:
        done, total = len(report.buckets), len(experiment.data.buckets)
        last = report.buckets[-1]
        print(f"{done} of {total}: {last.bucket.name} in {last.seconds:.0f} s", file=sys.stderr, flush=True)
        if parsed.json:
            parsed.json.write_text(report.to_json())

    report = compile_ahead(experiment, parsed.topology, each=each)
    print(report)
    return 0 if report.fits else 1


def _demo(verbs) -> None:
    parser = _verb(
        verbs, "demo", "the whole way on a small scale: data, VAE, video DiT, resume, samples, export, report",
        example="jvgen demo --workdir runs/demo",
    )  # fmt: skip
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"), help="everything is written here")
    parser.add_argument("--configs", type=Path, default=Path("configs"), help="folder with the demo's config files")
    parser.set_defaults(handler=_run_demo)


def _run_demo(parsed: argparse.Namespace) -> int:
    from jvgen.demo.demo import demo

    return demo(parsed.workdir, parsed.configs)


if __name__ == "__main__":
    sys.exit(main())
