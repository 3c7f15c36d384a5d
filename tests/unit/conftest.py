"""What several of these tests need: the command in process, a small data set, the demo's configs made tiny."""

import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from jvgen.cli import main as cli
from jvgen.data.builders.scenes import build_scenes
from jvgen.data.scenes.scenes import SceneConfig
from jvgen.interop.to_torch import export_network
from jvgen.kernels.attention import gpu
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.models.image_vae.model import ImageVAE
from jvgen.nested import map_with_path
from jvgen.nn.network import Network
from jvgen.parallel import axes
from jvgen.training import compilation

CONFIGS = Path(__file__).parents[2] / "configs"
TINY_VAE = ImageVAEConfig.tiny().replace(block_channels=(8, 8), groups=4)

NETWORK = {"block_channels": "8,8", "groups": "4", "layers_per_block": "1", "sample_size": "32"}
RUN = {
    "data.buckets.0.height": "16", "data.buckets.0.width": "16", "data.buckets.0.batch_size": "8", "data.threads": "1",
    "optimizer.kind": "adamw", "training.steps": "3", "training.evaluate_every": "0", "training.visualize_every": "0",
    "training.evaluation_batches": "1", "training.tensorboard": "false", "checkpoint.every": "2",
}  # fmt: skip
VIDEO = {
    "data.buckets.0.frames": "4", "task.spatial_compression": "2", "task.sampler.steps": "2",
    "task.denoiser.layers": "1", "task.denoiser.heads": "2", "task.denoiser.head_width": "8",
    "task.denoiser.text_width": "16", "task.denoiser.text_length": "16", "task.denoiser.condition_width": "16",
    "task.text.length": "16", "task.text.encoder.width": "16", "task.text.encoder.layers": "1",
    "task.text.encoder.heads": "2",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Done:
    """What a command left: exit status, standard output, standard error."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="session")
def jvgen() -> Callable[..., Done]:
    """Run the `jvgen` command in this process."""

    def run(*words: object) -> Done:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = cli.main([str(word) for word in words])
            except SystemExit as end:
                status = end.code
        return Done(status, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """Ten moving scenes of 4 frames, 16x16, and eight held out."""
    out = tmp_path_factory.mktemp("data") / "scenes"
    config = SceneConfig(height=16, width=16, frames=4, kinds={"dynamic": 1.0}, supersampling=1)
    build_scenes(out, config, train=10, validation=8, workers=1)
    return out


@pytest.fixture
def nothing_is_compiled() -> Iterator[None]:
    """For runs that are refused before their first step: their programs are compiled in threads that outlive them."""

    def end(jobs, count: int = 0) -> int:
        for job in jobs:
            job.error = AssertionError(f"{job.name} was to be compiled, in a test of a run that takes no step")
            job.done.set()
        return 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compilation, "_start_threads", end)
        yield


def settings(values: dict[str, str]) -> list[str]:
    return [word for path, value in values.items() for word in ("--set", f"{path}={value}")]


def sources(folder: Path) -> dict[str, str]:
    return {"data.sources.0.path": str(folder), "data.evaluation_sources.0.path": str(folder)}


@pytest.fixture(scope="session")
def vae_words(scenes) -> list[str]:
    """`CONFIG --set ...`: the demo's image VAE with two levels of 8 channels, three steps on the small scenes."""
    network = {f"task.network.{name}": value for name, value in NETWORK.items()}
    return [str(CONFIGS / "demo_image_vae.py"), *settings(RUN | network | sources(scenes))]


@pytest.fixture(scope="session")
def video_words() -> Callable[[Path, Path], list[str]]:
    """`CONFIG --set ...` for latents and the VAE that made them: a DiT of one layer on image latents, three steps."""

    def words(latents: Path, vae: Path) -> list[str]:
        network = {f"task.vae.{name}": value for name, value in NETWORK.items()} | {"task.vae_weights": str(vae)}
        return [str(CONFIGS / "demo_image_latents.py"), *settings(RUN | VIDEO | network | sources(latents))]

    return words


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory) -> Callable[[int], Path]:
    """A folder with the tiny VAE's weights drawn from a seed, as `jvgen export` writes it."""
    network = Network.of(lambda rngs: ImageVAE(TINY_VAE, rngs=rngs))
    made: dict[int, Path] = {}

    def folder(seed: int) -> Path:
        if seed not in made:
            rng = np.random.default_rng(seed)
            drawn = map_with_path(lambda path, leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), network.shapes)
            made[seed] = export_network(TINY_VAE, drawn, tmp_path_factory.mktemp("weights") / "vae")
        return made[seed]

    return folder


@pytest.fixture
def cuda_without_cudnn(monkeypatch) -> None:
    """Programs are traced as for an H100 whose machine has no cuDNN; they cannot run."""
    monkeypatch.setattr(axes, "platform", lambda: "gpu")
    monkeypatch.setattr(gpu, "compute_capability", lambda device: (9, 0))


@pytest.fixture
def cuda(monkeypatch, cuda_without_cudnn) -> None:
    """Programs are traced as for an H100 with cuDNN 9.11; they cannot run."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91100)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(fused_attention_stablehlo, "is_cuda_compute_capability_equal", lambda _: False)
