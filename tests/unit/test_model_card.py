"""The model card of an export says what the weights were trained on, and may be edited."""

import json

from jvgen import saved_config
from jvgen.data.stream.config import SourceConfig
from jvgen.interop.digest import DIGESTS_FILE
from jvgen.interop.file_digests import check_digests, write_digests
from jvgen.losses.perceptual import PerceptualConfig
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.runs.model_card import model_card
from jvgen.tasks.image_vae import ImageVAETaskConfig
from tests.toys import experiment as toy_experiment


def test_a_card_names_data_licenses_weights_and_config():
    made = toy_experiment()
    sources = (
        SourceConfig(path="data/a", where="aesthetic > 5"),
        SourceConfig(path="data/b", weight=2.0, exclude="robonet_test"),
    )
    perceptual = PerceptualConfig(kind="lpips", weights="lpips.safetensors")
    experiment = made.replace(
        name="mine",
        task=ImageVAETaskConfig(network=ImageVAEConfig.tiny(), perceptual=perceptual),
        data=made.data.replace(sources=sources, licenses=("cc-by", "cc0")),
    )
    text = model_card(experiment, step=1200, ema="0.999", licenses={"cc-by": 1500, "cc0": 7}, commit="abc123")
    for words in (
        "# mine\n", f"digest `{saved_config.digest(experiment)}`", "| steps | 1,200 of", "EMA 0.999", "`abc123`",
        "`data/a`, split train, weight 1, where `aesthetic > 5`", "weight 2, without the recordings of `robonet_test`",
        "cc-by (1,500 records), cc0 (7 records); records of others were left out",
        "`task.perceptual.weights`: `lpips.safetensors`",
    ):  # fmt: skip
        assert words in text, text
    plain = model_card(made, step=0, ema="best")
    assert "did not restrict them" in plain and "trained from random weights" in plain


def test_a_card_names_weights_that_the_config_does_not(tmp_path):
    made = toy_experiment()
    (tmp_path / "config.json").write_text("{}")
    given = {"network": "denoiser", "path": "weights/transformer", "digest": "abc123"}
    for options, said in (
        ({"imported": [given]}, "* denoiser, imported before the first step: `weights/transformer`, SHA-256 `abc123`"),
        ({"vae": tmp_path}, f"* the VAE that made the latents (`--vae`): `{tmp_path}`, SHA-256 `"),
    ):
        text = model_card(made, step=0, ema="best", **options)
        assert said in text and "None:" not in text
    other = made.replace(init_from=made.init_from.replace(run="runs/other"))
    assert "* those of the run that it started from, `runs/other`" in model_card(other, step=0, ema="best")


def test_a_card_may_be_edited(tmp_path):
    (tmp_path / "README.md").write_text("# A card\n")
    (tmp_path / "config.json").write_text("{}")
    write_digests(tmp_path)
    assert list(json.loads((tmp_path / DIGESTS_FILE).read_text())["sha256"]) == ["config.json"]
    (tmp_path / "README.md").write_text("# Another\n")
    check_digests(tmp_path)
