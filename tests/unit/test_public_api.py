"""The stable interface of `import jvgen`: fast to import, touches no device, and does what the command does."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
from flax import nnx

import jvgen
from jvgen.config import ConfigError
from jvgen.interop.from_torch import import_folder

NAMESPACES = (jvgen.control, jvgen.data, jvgen.evaluation, jvgen.geometry, jvgen.models)
NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))

CHECK = """
import sys, time
began = time.perf_counter()
import jvgen
took = time.perf_counter() - began
heavy = {"jax", "flax", "torch", "tensorflow", "numpy", "grain"} & set(sys.modules)
assert not heavy, heavy
assert took < 1, took
assert {"load_experiment", "train", "load_run", "load_vae", "load_world_model", "WorldModel"} <= set(dir(jvgen))
assert {"control", "data", "evaluation", "geometry", "models"} <= set(dir(jvgen))
jvgen.control, jvgen.data, jvgen.evaluation, jvgen.geometry, jvgen.models
heavy = {"jax", "flax", "torch", "tensorflow", "numpy", "grain"} & set(sys.modules)
assert not heavy, heavy
jvgen.load_experiment, jvgen.train, jvgen.load_run, jvgen.load_vae, jvgen.load_world_model, jvgen.models.VideoDiT
jvgen.data.render_scene, jvgen.evaluation.contact_sheet, jvgen.geometry.epipolar_bias
jvgen.control.Planner
assert "torch" not in sys.modules and "tensorflow" not in sys.modules
import jax
try:
    jax.devices()
except RuntimeError:  # as anything above that had touched a device
    pass
else:
    raise AssertionError("the platform of this test exists")
"""


def test_importing_is_fast_and_touches_no_device():
    environment = os.environ | {"JAX_PLATFORMS": "no_such_platform"}
    subprocess.run([sys.executable, "-c", CHECK], env=environment, check=True, timeout=120)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = jvgen.nonsense
    for namespace in NAMESPACES:
        with pytest.raises(AttributeError, match="nonsense"):
            _ = namespace.nonsense


@pytest.mark.parametrize("namespace", NAMESPACES, ids=lambda namespace: namespace.__name__)
def test_every_listed_name_exists(namespace):
    for name in namespace.__all__:
        value = getattr(namespace, name)
        assert not isinstance(value, ModuleType), f"{namespace.__name__}.{name} is hidden by a module of that name"
        assert getattr(value, "__name__", name) == name
    assert dir(namespace) == sorted(namespace.__all__)


def jvgen_imports(source: str) -> list[str]:
    """The modules of jvgen that a notebook cell imports, or imports names from."""
    modules = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules.append(node.module)
            if node.module == "jvgen":
                modules += [f"jvgen.{alias.name}" for alias in node.names]
    return [module for module in modules if module.split(".")[0] == "jvgen"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_import_the_public_api_alone(path):
    allowed = {"jvgen", *(f"jvgen.{name}" for name in jvgen.__all__)}
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    imported = [module for cell in cells for module in jvgen_imports("".join(cell["source"]))]
    assert imported and set(imported) <= allowed


def test_a_model_works_on_its_own():
    config = jvgen.models.ImageVAEConfig.tiny().replace(block_channels=(8, 8), groups=4)
    vae = jvgen.models.ImageVAE(config, rngs=nnx.Rngs(0))
    assert vae.decode(jax.numpy.zeros((1, 4, 4, config.latent_channels))).shape == (1, 8, 8, 3)


@pytest.fixture(scope="module")
def image_run(vae_words, tmp_path_factory) -> Path:
    """Three steps of the demo's image VAE, trained through the library."""
    path, overrides = vae_words[0], vae_words[2::2]
    experiment = jvgen.load_experiment(path, overrides)
    workdir = tmp_path_factory.mktemp("runs") / "image_vae"
    assert jvgen.train(experiment, workdir) == 0
    return workdir


def test_a_run_is_loaded_evaluated_and_exported(image_run, tmp_path):
    run = jvgen.load_run(image_run)
    assert run.step == 3 and set(run.parameters) == {"vae"}
    metrics = run.evaluate(batches=1)
    assert metrics["psnr"] > 0
    frames = np.zeros((1, 16, 16, 3), np.float32)
    vae = run.network("vae")
    assert vae(frames, method="encode").shape[:3] == (1, 8, 8)
    folder = run.export(tmp_path / "exported")
    assert import_folder(folder / "vae")[0] == vae.config
    assert "| steps | 3 of" in (folder / "README.md").read_text()
    with pytest.raises(ConfigError, match="has vae"):
        run.network("denoiser")


def test_a_saved_config_describes_the_run_again(image_run, tmp_path):
    assert jvgen.load_experiment(image_run / "config.json") == jvgen.load_run(image_run).experiment
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match="not a saved config"):
        jvgen.load_experiment(tmp_path / "broken.json")


def test_a_vae_encodes_and_decodes_videos(vae_folder):
    vae = jvgen.load_vae(vae_folder(0))
    video = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), np.uint8)
    latents = vae.encode(video)
    assert latents.shape == (3, 8, 8, vae.config.latent_channels) and latents.dtype == np.float32
    assert vae.decode(latents).shape == video.shape
    with pytest.raises(ValueError, match="uint8 frames F H W 3"):
        vae.encode(video.astype(np.float32))
    with pytest.raises(ValueError, match="z ="):
        vae.decode(latents[..., :2])
