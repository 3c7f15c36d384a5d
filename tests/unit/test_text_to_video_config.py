"""The config of the text-to-video task: its mistakes, files that do not fit it, what 0.1.0 saved, its FLOPs."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen import saved_config
from jvgen.config import ConfigError, validate_tree
from jvgen.data.store.records import Record
from jvgen.data.store.writer import Writer
from jvgen.data.stream.config import DataConfig, SourceConfig
from jvgen.data.stream.source_checks import LATENTS_FORMAT
from jvgen.diffusion.objective import ObjectiveConfig, TimestepConfig
from jvgen.diffusion.sampler import SamplerConfig
from jvgen.diffusion.schedule import ScheduleConfig
from jvgen.interop.to_torch import export_network
from jvgen.models.byte_text.config import ByteTextConfig
from jvgen.models.cogvideox_vae.config import CogVideoXVAEConfig
from jvgen.models.cogvideox_vae.model import CogVideoXVAE
from jvgen.models.t5.config import T5Config
from jvgen.models.video_dit.config import AggregationConfig, GateKind, Positions
from jvgen.nn.network import Network
from jvgen.nn.stacked import Remat
from jvgen.tasks.image_vae import ImageVAETaskConfig
from jvgen.tasks.text import TextConfig
from jvgen.tasks.text_to_video import TextToVideoConfig
from jvgen.training.telemetry import throughput

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_text_to_video import BUCKET, CONFIG, VAE, random_frozen  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilations")


# Mistakes.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"text": CONFIG.text.replace(encoder=ByteTextConfig(width=16, heads=2))},
            ["text.width = 16", "text_width = 8", "equal"],
        ),
        ({"text": CONFIG.text.replace(length=9)}, ["text.length = 9", "text_length = 6"]),
        (
            {"denoiser": CONFIG.denoiser.replace(in_channels=8)},
            ["in_channels = 8", "out_channels = 4", "both must be equal"],
        ),
        ({"text": CONFIG.text.replace(length=0)}, ["task.text", "length = 0", "at least 1"]),
        ({"text": CONFIG.text.replace(weights="t5")}, ["byte encoder", "weights"]),
        (
            {"text": TextConfig(encoder=T5Config(width=8), length=6, weights="t5"), "text_encoder_weights": "other"},
            ["text_encoder_weights = 'other'", "byte encoder", "text.weights"],
        ),
        (
            {"text": CONFIG.text.replace(encoder=ByteTextConfig(width=8, heads=3))},
            ["heads = 3", "width = 8", "divisor"],
        ),
        ({"latents": "pixels", "vae": None}, ["latents = 'pixels'", "needs vae"]),
        ({"vae": VAE.replace(latent_channels=8)}, ["vae.latent_channels = 8", "out_channels = 4", "equal"]),
        ({"temporal_compression": 4}, ["temporal_compression = 1", "image VAE"]),
        ({"spatial_compression": 8}, ["spatial_compression = 8", "the VAE's is 2"]),
        ({"caption_dropout": 1.0}, ["caption_dropout = 1.0", "below 1"]),
        ({"latent_scale": 0.0}, ["latent_scale = 0.0", "positive"]),
        ({"objective": ObjectiveConfig(target="epsilon")}, ["target = 'epsilon'", "pure noise", "choose"]),
        ({"denoiser": CONFIG.denoiser.replace(head_width=7)}, ["heads x head_width", "multiple of 16"]),
        ({"denoiser": CONFIG.denoiser.replace(positions=Positions.ROTARY)}, ["head_width = 8", "multiple of 16"]),
        ({"sampler": SamplerConfig(kind="euler", eta=0.5)}, ["eta = 0.5", "only ddim"]),
        # Said when training starts, not when its clips are sampled.
        (
            {
                "schedule": ScheduleConfig(),
                "objective": ObjectiveConfig(target="v"),
                "sampler": SamplerConfig(kind="euler"),
            },
            ["sampler 'euler'", "needs rectified_flow", "choose 'ddim'"],
        ),
    ],
)
def test_mistakes_in_the_config(changes, words):
    with pytest.raises(ConfigError) as error:
        validate_tree(CONFIG.replace(**changes), "task")
    assert all(word in str(error.value) for word in ["task", *words]), error.value


@pytest.mark.parametrize(
    ("bucket_changes", "config_changes", "words"),
    [
        ({"height": 6}, {}, ["height = 6", "multiple of 4", "take 4"]),
        ({"views": 2}, {}, ["views = 2", "views = 1"]),
        ({"frames": 8}, {"vae": None, "temporal_compression": 4}, ["frames = 8", "4n + 1", "take 5"]),
    ],
)
def test_buckets_that_do_not_fit(bucket_changes, config_changes, words):
    with pytest.raises(ValueError) as error:
        CONFIG.replace(**config_changes).check_bucket(BUCKET.replace(**bucket_changes))
    assert all(word in str(error.value) for word in words), error.value


def test_examples_without_the_required_arrays():
    pixels = {"video": np.zeros((3, 8, 8, 3), np.uint8), "caption": "red"}
    latents = {"latents": np.zeros((3, 4, 4, 8), np.float32), "caption": "red"}
    with pytest.raises(ValueError, match="jvgen data build latents"):
        CONFIG.build().preprocess(pixels)
    with pytest.raises(ValueError, match="cached latents only"):
        CONFIG.replace(latents="pixels").build().preprocess(latents)
    assert set(CONFIG.build().preprocess(latents)) == set(CONFIG.build().fields(BUCKET))
    assert set(CONFIG.replace(latents="pixels").build().preprocess(pixels)) == {"video", "tokens"}


def test_weights_of_the_vae_are_checked_before_they_are_read(tmp_path):
    export_network(VAE, random_frozen()["vae"], tmp_path / "vae")

    def with_weights(folder, **changes) -> TextToVideoConfig:
        return CONFIG.replace(vae_weights=None if folder is None else str(tmp_path / folder), **changes)

    with_weights("vae").check_weights()
    with_weights("vae", vae=VAE.replace(scaling_factor=0.5, sample_size=64, remat=Remat.FULL)).check_weights()
    for config, words in (
        (with_weights(None), ["task.vae_weights = none", "jvgen export"]),
        (with_weights("nowhere"), ["nowhere", "no such file or folder"]),
        (with_weights("."), ["no config.json", "vae"]),
        (
            with_weights("vae", vae=VAE.replace(block_channels=(8, 16), groups=8)),
            [
                "task.vae_weights",
                "block_channels: (8, 8) in the weights, (8, 16) in the run",
                "groups: 4",
                "change the config",
            ],
        ),
    ):
        with pytest.raises(ValueError) as error:
            config.check_weights()
        assert all(word in str(error.value) for word in words), error.value


def test_a_vae_that_is_given_later_must_fit_the_latents(tmp_path):
    export_network(VAE, random_frozen()["vae"], tmp_path / "vae")
    wide = CogVideoXVAEConfig.tiny().replace(latent_channels=VAE.latent_channels)
    export_network(wide, Network.of(lambda rngs: CogVideoXVAE(wide, rngs=rngs)).init(jax.random.key(0)), tmp_path / "x")
    config = CONFIG.replace(vae=None, vae_weights=None)
    assert config.with_vae(str(tmp_path / "vae")) == CONFIG.replace(vae_weights=str(tmp_path / "vae"))
    for run, folder, words in (
        (CONFIG, "vae", ("names a VAE", repr(CONFIG.vae_weights))),
        (config, "x", ("scaling_factor is 1.15258426", "task.latent_scale")),
        (config.replace(latent_scale=wide.scaling_factor), "x", ("does not fit", "temporal_compression = 4")),
        (config.replace(temporal_compression=4), "vae", ("does not fit", "temporal_compression = 1")),
    ):
        with pytest.raises(ValueError) as error:
            run.with_vae(str(tmp_path / folder))
        assert all(word in str(error.value) for word in (f"--vae {tmp_path / folder}", *words)), error.value
    with pytest.raises(ValueError, match="ImageVAETaskConfig has no latents"):
        ImageVAETaskConfig(network=VAE).with_vae(str(tmp_path / "vae"))


def test_latents_are_those_of_one_encoder_whether_or_not_the_run_names_it(tmp_path):
    for name, encoder in (("a", "abc"), ("b", "abc"), ("c", "xyz"), ("pixels", None)):
        latents = {} if encoder is None else {"latents": {"encoder": encoder, "format": LATENTS_FORMAT}}
        with Writer(tmp_path / name, description="test", metadata=latents) as writer:
            writer.add("train", Record(id="r", kind="dynamic", clips=(b"0",), frames=1, height=8, width=8))

    def data(*names: str) -> DataConfig:
        return DataConfig(sources=tuple(SourceConfig(path=str(tmp_path / n)) for n in names), buckets=(BUCKET,))

    config = CONFIG.replace(vae=None, vae_weights=None)
    config.check_data(data("a", "b"))
    with pytest.raises(ValueError, match="made by different encoders .*a by abc, .*c by xyz"):
        config.check_data(data("a", "c"))
    with pytest.raises(ValueError, match="has no cached latents"):
        config.check_data(data("pixels"))


def test_given_frames_need_pixels_beside_cached_latents(tmp_path):
    """Said before the first batch, not by every record of it."""
    latents = {"latents": {"encoder": "abc", "format": LATENTS_FORMAT}}
    kept = {"kind": "dynamic", "latents": np.zeros((1, 1, 4, 4, 8), np.float16), "frames": 1, "height": 8, "width": 8}
    for name, clips in (("both", (b"0",)), ("latents", ())):
        with Writer(tmp_path / name, description="test", metadata=latents) as writer:
            writer.add("train", Record(id="r", clips=clips, **kept))
    config = CONFIG.replace(vae_weights=None, condition="first_frame", denoiser=CONFIG.denoiser.replace(in_channels=8))
    for name in ("both", "latents"):
        made = DataConfig(sources=(SourceConfig(path=str(tmp_path / name)),), buckets=(BUCKET,))
        CONFIG.replace(vae_weights=None).check_data(made)
        if name == "both":
            config.check_data(made)
            continue
        with pytest.raises(ValueError, match="cached latents but no pixels.* --keep-clips"):
            config.check_data(made)


# Configs that version 0.1.0 saved.


@pytest.mark.parametrize(
    "saved, expected",
    [({"class": "jvgen.diffusion.sampler:SamplerConfig", "goes_to": "stride", "ends_clean": False},
      SamplerConfig(step_to="stride", final_step_clean=False)),
     ({"class": "jvgen.diffusion.objective:TimestepConfig", "deviation": 0.5}, TimestepConfig(std=0.5)),
     ({"class": "jvgen.models.video_dit.config:AggregationConfig", "gate": "channel"},
      AggregationConfig(gate=GateKind.CHANNEL, memory_saving=True)),
     ({"class": "jvgen.tasks.text:TextConfig", "encoder": {"class": "T5Config"}, "null": "empty"},
      TextConfig(encoder=T5Config(), unconditional="empty_caption")),
     ({"class": "jvgen.tasks.text:TextConfig", "encoder": {"class": "T5Config"}, "null": "zeros"},
      TextConfig(encoder=T5Config(), unconditional="zeros"))],
    ids=["sampler", "timesteps", "aggregation", "empty caption", "zeros"],
)  # fmt: skip
def test_renamed_fields_of_saved_configs(saved, expected):
    assert saved_config.decode(saved) == expected


def test_utilization_counts_neither_padding_nor_frozen_networks():
    """512 rows are computed of the few that the clip has; T5 or the autoencoder only run forward."""
    task = CONFIG.replace(latents="pixels").build()
    padded = CONFIG.replace(latents="pixels", denoiser=CONFIG.denoiser.replace(token_multiple=512)).build()
    flops = throughput.step_flops(task, BUCKET)
    assert throughput.step_flops(padded, BUCKET) == flops
    trained = throughput.trained_flops(task, flops)
    assert set(flops) - set(trained) == {"vae"} and all(trained[name] == flops[name] for name in trained)


@pytest.mark.parametrize("latents", ["pixels", "data"])
def test_flops_of_a_step_count_frozen_networks_once(latents):
    """The autoencoder runs forward only, and not at all on cached latents; the byte encoder is trained."""
    task = CONFIG.replace(latents=latents).build()
    parts, step = task.flops(BUCKET), throughput.step_flops(task, BUCKET)
    assert step["text_encoder"] == 3 * BUCKET.batch_size * parts["text_encoder"] > 0
    assert ("vae" in step) == (latents == "pixels")
    if latents == "pixels":
        shape = jax.ShapeDtypeStruct((1, 3, 8, 8, 3), jnp.float32)
        network = task.frozen_networks["vae"]
        encode = jax.jit(lambda parameters, clips: task.coder.moments(parameters, clips))
        counted = encode.lower(network.shapes, shape).cost_analysis()["flops"]
        # XLA leaves out products with the padding, and counts norms.
        assert step["vae"] == BUCKET.batch_size * parts["vae"]
        assert parts["vae"] == pytest.approx(counted, rel=0.5)
