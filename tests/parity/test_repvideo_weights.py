"""RepVideo's weights between this code, diffusers' folders with gates beside them, and the SAT code's files."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jvgen.config import ConfigError
from jvgen.interop.architecture import differences
from jvgen.interop.digest import DIGESTS_FILE
from jvgen.interop.formats import format_of
from jvgen.interop.from_torch import check_weights, import_folder, read_config
from jvgen.interop.safetensors_file import SafetensorsFile
from jvgen.interop.sat_file import export_sat
from jvgen.interop.to_torch import ExportError, export_network
from jvgen.interop.verify import verify
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.models.video_dit.config import AggregationConfig, GateKind, Positions, VideoDiTConfig
from jvgen.models.video_dit.torch_map import weight_map_sat
from jvgen.models.weight_map import WeightError
from jvgen.nested import flatten, unflatten

CASES = Path(__file__).parents[1] / "golden" / "cases"
REPVIDEO = VideoDiTConfig(
    layers=3, heads=2, head_width=16, in_channels=4, out_channels=4, text_width=12, text_length=6, condition_width=16,
    sample_height=8, sample_width=12, sample_frames=3, aggregation=AggregationConfig(),
)  # fmt: skip
COGVIDEOX = REPVIDEO.replace(aggregation=None)


def random_parameters(config: VideoDiTConfig) -> dict:
    rng = np.random.default_rng(0)
    flat = sorted(flatten(format_of(config).network(config).shapes).items())
    values = {path: 0.2 * rng.standard_normal(leaf.shape).astype(np.float32) for path, leaf in flat}
    return unflatten({path: value + np.float32(path.endswith("scale")) for path, value in values.items()})


def assert_same(found: dict, expected: dict) -> None:
    found, expected = flatten(found), flatten(expected)
    assert set(found) == set(expected)
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


@pytest.fixture(scope="module")
def parameters() -> dict:
    return random_parameters(REPVIDEO)


@pytest.fixture(scope="module")
def folder(parameters, tmp_path_factory):
    return export_network(REPVIDEO, parameters, tmp_path_factory.mktemp("export") / "denoiser", shard_bytes=20_000)


# Diffusers' folder.


def test_gates_are_stored_beside_weights_that_diffusers_loads_strictly(folder, parameters):
    for module in ("torch", "diffusers"):
        pytest.importorskip(module)
    assert {"repvideo_gates.safetensors", "repvideo_gates.json"} <= {path.name for path in folder.iterdir()}
    report = verify(folder, REPVIDEO, parameters)
    assert report.max_abs_error < 2e-5, str(report)


@pytest.mark.parametrize(
    "config",
    [REPVIDEO, REPVIDEO.replace(aggregation=AggregationConfig(period=2, gate=GateKind.CHANNEL)),
     REPVIDEO.replace(aggregation=AggregationConfig(gate=GateKind.SIGMOID), output_norm_epsilon=1e-6)],
    ids=["scalar", "channel", "sigmoid"],
)  # fmt: skip
def test_a_folder_is_read_back_with_its_gates(config, tmp_path):
    parameters = random_parameters(config)
    folder = export_network(config, parameters, tmp_path / "denoiser")
    check_weights(folder)
    found, read = import_folder(folder)
    assert found == config.replace(token_multiple=found.token_multiple)
    assert_same(read, parameters)
    assert not differences(found, config.replace(aggregation=config.aggregation.replace(initial=0.25)))


def test_networks_with_and_without_gates_are_distinguished(folder, tmp_path):
    assert any("aggregation" in line for line in differences(read_config(folder), COGVIDEOX))
    plain = export_network(COGVIDEOX, random_parameters(COGVIDEOX), tmp_path / "plain")
    assert read_config(plain).aggregation is None
    lines = differences(read_config(plain), REPVIDEO)
    assert [line for line in lines if line.startswith("aggregation: None in the weights")]
    other = REPVIDEO.replace(aggregation=AggregationConfig(period=4))
    assert any("period: 6 in the weights, 4 in the run" in line for line in differences(read_config(folder), other))


@pytest.mark.parametrize("lost", ["json", "safetensors"])
def test_half_a_pair_of_files_is_an_error(folder, tmp_path, lost):
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / f"repvideo_gates.{lost}").unlink()
    with pytest.raises(ValueError, match=f"exists without repvideo_gates.{lost}"):
        read_config(broken)


def test_gates_of_another_network_are_an_error(folder, tmp_path):
    mixed = shutil.copytree(folder, tmp_path / "mixed", ignore=shutil.ignore_patterns(DIGESTS_FILE))
    channel = REPVIDEO.replace(aggregation=AggregationConfig(gate=GateKind.CHANNEL))
    other = export_network(channel, random_parameters(channel), tmp_path / "other")
    shutil.copy(other / "repvideo_gates.safetensors", mixed)
    with pytest.raises(WeightError, match="learnable_gating"):
        import_folder(mixed)
    (mixed / "repvideo_gates.json").write_text('{"period": 6}')
    with pytest.raises(ValueError, match="does not describe the tensors"):
        import_folder(mixed)


# The SAT code's files.


@pytest.mark.parametrize("name", ["repvideo_dit_tiny", "repvideo_dit_noagg_tiny"])
def test_a_sat_file_has_the_names_and_shapes_that_the_code_loads_strictly(name, tmp_path):
    """Against the state dict of the released code itself, with and without aggregation."""
    file = SafetensorsFile(CASES / name / "weights.safetensors")
    weights = {key: file[key] for key in file}
    gates, table = "transformer.learnable_gating", "mixins.pos_embed.pos_embedding"
    layers = len(weights[gates])
    aggregation = AggregationConfig() if weights[gates].any() else None
    if aggregation is None:
        del weights[gates]
    config = VideoDiTConfig(
        layers=layers, heads=3, head_width=16, in_channels=4, out_channels=4, text_width=20, text_length=5,
        condition_width=16, sample_height=4, sample_width=6, aggregation=aggregation,
        # As many frames as their table has places for.
        sample_frames=(weights[table].shape[1] - 5) // 6,
    )  # fmt: skip
    parameters = weight_map_sat(config, prefix="").from_torch(weights, format_of(config).network(config).shapes)
    written = SafetensorsFile(export_sat(config, parameters, tmp_path / "model.safetensors", prefix=""))
    assert set(written) == set(weights)
    np.testing.assert_allclose(written[table], weights.pop(table), atol=5e-8)
    for key, array in weights.items():
        np.testing.assert_array_equal(written[key], array, err_msg=key)


@pytest.mark.parametrize("positions", list(Positions))
def test_sat_files_are_read_back(positions, tmp_path):
    config = REPVIDEO.replace(positions=positions)
    parameters = random_parameters(config)
    path = export_sat(config, parameters, tmp_path / "model.safetensors")
    assert_same(import_folder(path, config)[1], parameters)
    with pytest.raises(WeightError, match="learnable_gating"):
        import_folder(path, config.replace(aggregation=None))
    plain = {name: value for name, value in parameters.items() if name != "aggregation"}
    without = export_sat(config.replace(aggregation=None), plain, tmp_path / "plain.safetensors")
    with pytest.raises(WeightError, match="missing"):
        import_folder(without, config)


def test_released_checkpoints_hold_other_networks_under_a_key(tmp_path, parameters):
    torch = pytest.importorskip("torch")
    path = export_sat(REPVIDEO, parameters, tmp_path / "model.safetensors")
    file = SafetensorsFile(path)
    tensors = {name: torch.from_numpy(np.array(file[name])) for name in file}
    others = {"first_stage_model.encoder.conv_in.weight": torch.zeros(1), "conditioner.embedders.0.x": torch.zeros(1)}
    torch.save({"module": {**tensors, **others}}, tmp_path / "mp_rank_00_model_states.pt")
    assert_same(import_folder(tmp_path / "mp_rank_00_model_states.pt", REPVIDEO)[1], parameters)


def test_unsupported_networks_are_not_exported_to_sat(tmp_path, parameters):
    for aggregation in (AggregationConfig(gate=GateKind.SIGMOID), AggregationConfig(period=3)):
        config = REPVIDEO.replace(aggregation=aggregation)
        with pytest.raises(ValueError, match="the SAT code has gates of kind scalar and a period of 6"):
            export_sat(config, random_parameters(config), tmp_path / "model.safetensors")
    with pytest.raises(ExportError, match="ImageVAEConfig"):
        export_sat(ImageVAEConfig.tiny(), {}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_text("mine")
    with pytest.raises(ExportError, match="exists"):
        export_sat(REPVIDEO, parameters, tmp_path / "model.safetensors")


# From CogVideoX to RepVideo.


def test_cogvideox_initializes_a_repvideo_run(tmp_path, video_run):
    experiment, weights = video_run
    from jvgen.runs.exporting import import_run
    from jvgen.training.checkpoint.restore import load_for_inference

    with pytest.raises(ConfigError, match="--init-gates"):
        import_run(weights, experiment, tmp_path / "refused")
    import_run(weights, experiment, tmp_path / "run", init_gates=True)
    _, _, parameters, step = load_for_inference(tmp_path / "run", None)
    found = jax.tree.map(np.asarray, parameters["denoiser"])
    np.testing.assert_array_equal(found.pop("aggregation")["gates"], np.full(3, 0.25, np.float32))
    assert step == 0
    assert_same(found, random_parameters(COGVIDEOX))


@pytest.fixture(scope="module")
def video_run(tmp_path_factory):
    """A RepVideo run of the tiny network, and CogVideoX's weights of it in a folder."""
    from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
    from jvgen.models.byte_text.config import ByteTextConfig
    from jvgen.tasks.text import TextConfig
    from jvgen.tasks.text_to_video import TextToVideoConfig
    from jvgen.training.config import PrecisionConfig, TrainingConfig
    from jvgen.training.experiment import Experiment

    task = TextToVideoConfig(
        denoiser=REPVIDEO.replace(aggregation=AggregationConfig(initial=0.25)),
        text=TextConfig(encoder=ByteTextConfig(width=12, layers=1, heads=2), length=6),
    )
    data = DataConfig(
        sources=(SourceConfig(path="nowhere"),), buckets=(BucketConfig(frames=9, height=64, width=96, batch_size=1),)
    )
    experiment = Experiment(
        name="repvideo",
        task=task,
        data=data,
        training=TrainingConfig(steps=1, precision=PrecisionConfig(compute_dtype="float32")),
    )
    folder = tmp_path_factory.mktemp("cogvideox") / "denoiser"
    return experiment, export_network(COGVIDEOX, random_parameters(COGVIDEOX), folder)
