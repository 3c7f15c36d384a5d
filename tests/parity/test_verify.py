"""`jvgen verify`: exported folders load strictly in the original classes, with equal outputs; errors are reported."""

import jax
import numpy as np
import pytest

from jvgen.interop.digest import DIGESTS_FILE
from jvgen.interop.formats import format_of
from jvgen.interop.from_torch import import_folder
from jvgen.interop.to_torch import export_network
from jvgen.interop.verify import VerifyError, verify
from jvgen.models.byte_text.config import ByteTextConfig
from jvgen.models.dinov2.config import Dinov2Config
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.models.t5.config import T5Config
from jvgen.models.video_dit.config import Positions, VideoDiTConfig
from jvgen.nested import flatten, unflatten

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytestmark = [pytest.mark.torch]

DIT = VideoDiTConfig(
    layers=2,
    heads=2,
    head_width=16,
    in_channels=4,
    out_channels=4,
    text_width=12,
    text_length=6,
    condition_width=16,
    sample_height=8,
    sample_width=12,
    sample_frames=3,
)
CONFIGS = {
    "vae": ImageVAEConfig(block_channels=(4, 8), layers_per_block=1, groups=4),
    "dit_sincos": DIT,
    "dit_rotary": DIT.replace(positions=Positions.ROTARY),
    "t5": T5Config(vocabulary=30, width=16, layers=2, heads=2, head_width=8, hidden=24, buckets=8, max_distance=16),
    "byte_text": ByteTextConfig(width=16, layers=2, heads=2),
    "dinov2": Dinov2Config(width=16, layers=2, heads=2, hidden=64, patch=4, side=12),
}


def random_parameters(config) -> dict:
    rng = np.random.default_rng(0)
    flat = flatten(format_of(config).network(config).shapes)
    values = {path: 0.2 * rng.standard_normal(leaf.shape).astype(np.float32) for path, leaf in flat.items()}
    return unflatten({path: value + path.endswith("scale") for path, value in values.items()})


@pytest.mark.parametrize("name", list(CONFIGS))
def test_exports_load_strictly_with_equal_outputs(tmp_path, name):
    config = CONFIGS[name]
    parameters = random_parameters(config)
    folder = export_network(config, parameters, tmp_path / name, shard_bytes=20_000)
    found, imported = import_folder(folder)
    report = verify(folder, found, imported)
    assert report.max_abs_error < 2e-5, str(report)
    assert min(report.scales.values()) > 0.1, str(report)
    leaves = zip(jax.tree.leaves(parameters), jax.tree.leaves(imported), strict=True)
    assert all(np.array_equal(left, right) for left, right in leaves)


def test_differences_and_misfits_are_reported(tmp_path):
    config = CONFIGS["vae"]
    parameters = random_parameters(config)
    folder = export_network(config, parameters, tmp_path / "vae")
    moved = flatten(parameters)
    moved["decoder/conv_in/bias"] = moved["decoder/conv_in/bias"] + 0.5
    report = verify(folder, config, unflatten(moved))
    assert report.errors["moments"] < 2e-5 < 1e-3 < report.errors["decoded"] == report.max_abs_error
    assert "AutoencoderKL loads strictly" in str(report) and "decoded: max abs error" in str(report)

    smaller = config.replace(quant_convolutions=False)
    other = export_network(smaller, random_parameters(smaller), tmp_path / "smaller")
    (other / DIGESTS_FILE).unlink()
    (other / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(VerifyError, match="missing keys: .*post_quant_conv"):
        verify(other, config, parameters)
