"""Encoding and decoding one clip: ours against diffusers' CogVideoX VAE of the same widths, and the authors' own code.

The authors' code is compared with where the environment variable JVGEN_CV_VAE_CODE names a checkout of it
(github.com/AILab-CVC/CV-VAE): their network of the Stable Diffusion 3 variant, with our weights and equal outputs.
The clip is noise, or recorded where JVGEN_REAL_DATA names a folder with video/*.mp4.
"""

import ctypes
import dataclasses
import gc
import importlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX
from einops import rearrange

from jvgen.data.video_files import read_frames
from jvgen.models.cv_vae import flops
from jvgen.models.cv_vae.config import CVVAEConfig
from jvgen.models.cv_vae.model import CVVAE
from jvgen.models.cv_vae.torch_map import weight_map
from jvgen.nn.network import Network
from tests.benchmarks import timing
from tests.benchmarks.machine import Settings
from tests.benchmarks.report import Result

CODE = "JVGEN_CV_VAE_CODE"


@dataclasses.dataclass(frozen=True)
class Size:
    """A network's widths, and one clip of square frames."""

    channels: tuple[int, ...]
    frames: int
    side: int
    groups: int = 32
    layers: int = 2
    dtype: str = "float32"


QUICK = {"tiny": Size((4, 4, 4, 4), 5, 16, groups=2, layers=1)}
CPU = {"quarter": Size((32, 64, 128, 128), 9, 64), "published": Size((128, 256, 512, 512), 9, 96)}
GPU = {"published": Size((128, 256, 512, 512), 17, 256, dtype="bfloat16")}
# Ours by name: the published network, and this library's causal one.
OURS = {"sd3": CVVAEConfig.sd3(), "causal": CVVAEConfig.causal().replace(latent_channels=16, quant_convolutions=False)}
SHOWN = (
    "case", "what", "ours_frames_s", "cogvideox_frames_s", "authors_frames_s", "time_over_cogvideox", "middle_half",
    "time_over_authors", "ours_peak_MiB", "cogvideox_peak_MiB", "authors_peak_MiB", "ours_GFLOP", "difference",
)  # fmt: skip


def config_of(name: str, size: Size) -> CVVAEConfig:
    """One of ours with a size's widths."""
    return OURS[name].replace(block_channels=size.channels, groups=size.groups, layers_per_block=size.layers)


def parameters_of(network: Network) -> dict:
    """Random parameters that keep activations of about their size."""
    rng = np.random.default_rng(0)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if leaf.ndim == 1:
            return np.full(leaf.shape, 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0, np.float32)
        return (rng.standard_normal(leaf.shape) * np.prod(leaf.shape[:-1]) ** -0.5).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, network.shapes)


def cogvideox(size: Size) -> AutoencoderKLCogVideoX:
    """Diffusers' network with as many levels, widths and layers; it compresses time by four as well."""
    return AutoencoderKLCogVideoX(
        block_out_channels=size.channels, layers_per_block=size.layers, norm_num_groups=size.groups,
        down_block_types=("CogVideoXDownBlock3D",) * len(size.channels),
        up_block_types=("CogVideoXUpBlock3D",) * len(size.channels),
    )  # fmt: skip


def authors(size: Size, weights: dict[str, np.ndarray]) -> tuple[torch.nn.Module, torch.nn.Module] | None:
    """Encoder and decoder of the authors' code with our weights, loaded strictly; None without that code."""
    folder = os.environ.get(CODE)
    if folder is None:
        return None
    if str(Path(folder)) not in sys.path:
        sys.path.insert(0, str(Path(folder)))
    code = importlib.import_module("models.vae_models3d_sd3")
    shared = {
        "block_out_channels": list(size.channels), "layers_per_block": size.layers, "norm_num_groups": size.groups,
        "mid_block_add_attention": True, "half_3d": True,
    }  # fmt: skip
    levels = len(size.channels)
    encoder = code.Encoder3D(
        in_channels=3, out_channels=16, down_block_types=["DownEncoderBlock3D"] * levels, double_z=True, causal=True,
        **shared,
    )  # fmt: skip
    decoder = code.Decoder3D(
        in_channels=16, out_channels=3, up_block_types=["UpDecoderBlock3D"] * levels, causal=False, **shared
    )
    for name, module in (("encoder", encoder), ("decoder", decoder)):
        own = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
        module.load_state_dict({key: torch.from_numpy(value.copy()) for key, value in own.items()}, strict=True)
    return encoder.eval(), decoder.eval()


def clip_of(size: Size) -> np.ndarray:
    """One clip in [-1, 1], recorded if there is a recording: its first frames' middle squares."""
    recordings = sorted((Path(os.environ.get("JVGEN_REAL_DATA", "")) / "video").glob("*.mp4"))
    if not recordings:
        return np.random.default_rng(1).uniform(-1, 1, (1, size.frames, size.side, size.side, 3)).astype(np.float32)
    fitted = []
    for frame in itertools.islice(read_frames(recordings[0]), size.frames):
        short, left = min(frame.shape[:2]), (frame.shape[1] - min(frame.shape[:2])) // 2
        square = frame[:short, left : left + short]
        fitted.append(cv2.resize(square, (size.side, size.side), interpolation=cv2.INTER_AREA))
    return np.stack(fitted)[None].astype(np.float32) / 127.5 - 1


def peak_MiB(function: Callable[[], object]) -> float:  # noqa: N802
    """Largest memory of this process during a call, over that before it."""
    if jax.default_backend() == "gpu":
        return float("nan")
    done, peak = threading.Event(), [0]
    page = os.sysconf("SC_PAGE_SIZE")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], resident())

    # What was freed goes back first, or it would be used again and not be seen.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident()
    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    done.set()
    watcher.join()
    return max(peak[0] - before, 0) / 2**20


def compare(case: str, name: str, size: Size, settings: Settings) -> tuple[list[dict], dict]:
    """Rows of encoding and decoding with one of our networks, and all samples."""
    config = config_of(name, size)
    network = Network.of(lambda rngs: CVVAE(config, rngs=rngs))
    parameters = parameters_of(network)
    device, dtype = ("cuda", torch.bfloat16) if size.dtype == "bfloat16" else ("cpu", torch.float32)
    rng = np.random.default_rng(1)
    clip = clip_of(size)
    latent = (1, config.latent_frames(size.frames), *config.latent_size(size.side, size.side), config.latent_channels)
    given = {"encode": clip, "decode": rng.standard_normal(latent).astype(np.float32)}
    weights = dict(weight_map(config).to_torch(parameters)) if name == "sd3" else {}
    released = authors(size, weights) if name == "sd3" else None
    other = cogvideox(size).to(device, dtype).eval()
    theirs: dict[str, dict[str, Callable]] = {
        "cogvideox": {"encode": lambda x: other.encode(x).latent_dist.mean, "decode": lambda z: other.decode(z).sample}
    }
    if released is not None:
        modules = dict(zip(("encode", "decode"), (module.to(device, dtype) for module in released), strict=True))
        theirs["authors"] = modules
    ours = jax.device_put(jax.tree.map(lambda leaf: leaf.astype(size.dtype), parameters))
    costs = {
        "encode": sum(flops.encode(config, size.frames, size.side, size.side).values()),
        "decode": sum(flops.decode(config, *latent[1:4]).values()),
    }
    rows, samples = [], {}
    for what, array in given.items():
        jitted = jax.jit(lambda tree, x, method=what: network.apply(tree, x, method=method))
        argument = jnp.asarray(array, size.dtype)
        began = time.perf_counter()
        program = jitted.lower(ours, argument).compile()
        compiled = time.perf_counter() - began
        tensor = torch.from_numpy(rearrange(array, "b f h w c -> b c f h w").copy()).to(device, dtype)
        results: dict[str, object] = {}

        def run(side: str, function: Callable, *arguments: object, results: dict = results) -> None:
            with torch.no_grad():
                results[side] = function(*arguments)
            if side == "ours":
                jax.block_until_ready(results[side])
            elif device == "cuda":
                torch.cuda.synchronize()

        sides = {"ours": lambda run=run, program=program, x=argument: run("ours", program, ours, x)}
        for side, functions in theirs.items():
            sides[side] = lambda run=run, side=side, f=functions[what], x=tensor: run(side, f, x)
        for warm in sides.values():
            warm()
        peaks = {side: peak_MiB(function) for side, function in sides.items()}
        timed = timing.in_turns(sides, settings.repeats)
        found = timing.ratio(timed["ours"], timed["cogvideox"])
        row: dict[str, object] = {
            "case": f"{case} {name}", "what": what, "ours_compile_s": compiled, "ours_GFLOP": costs[what] / 1e9,
            "time_over_cogvideox": found["ratio_of_medians"], "middle_half": found["middle_half"],
            "minima_over_cogvideox": found["ratio_of_minima"],
            "ours_parameters": sum(leaf.size for leaf in jax.tree.leaves(parameters)),
            "cogvideox_parameters": sum(leaf.numel() for leaf in other.parameters()),
            "ours_temporary_MiB": program.memory_analysis().temp_size_in_bytes / 2**20,
        }  # fmt: skip
        for side in sides:
            row[f"{side}_frames_s"] = size.frames / timed[side].median
            row[f"{side}_peak_MiB"] = peaks[side]
        if "authors" in sides:
            row["time_over_authors"] = timing.ratio(timed["ours"], timed["authors"])["ratio_of_medians"]
            made = rearrange(results["authors"].float().cpu().numpy(), "b c f h w -> b f h w c")
            mine = np.asarray(results["ours"], np.float32)
            row["difference"] = float(np.abs(made - mine).max() / np.abs(made).max())
            assert size.dtype != "float32" or row["difference"] < 1e-4, "both sides must do the same work"
        rows.append(row)
        samples[what] = {side: dataclasses.asdict(sample) for side, sample in timed.items()}
    return rows, samples


def run(settings: Settings) -> Result:
    """All cases of this backend."""
    sizes = QUICK if settings.quick else GPU if jax.default_backend() == "gpu" else CPU
    settings = dataclasses.replace(settings, repeats=min(settings.repeats, 5))
    if jax.default_backend() == "cpu":
        torch.set_num_threads(settings.cores)
    rows, samples = [], {}
    for case, size in sizes.items():
        for name in OURS:
            some, samples[f"{case} {name}"] = compare(case, name, size, settings)
            rows += some
    return Result(
        title="encoding and decoding a clip; time over the other's, below 1 is faster",
        settings={case: dataclasses.asdict(size) for case, size in sizes.items()},
        rows=rows,
        shown=SHOWN,
        samples=samples,
        notes=(
            "CogVideoX's VAE of the same widths, levels and layers: other convolutions, not the same work.",
            f"authors: their network with our weights, outputs equal to 1e-4; needs {CODE}.",
            "peak: of the whole process over what it held before the call.",
        ),
    )
