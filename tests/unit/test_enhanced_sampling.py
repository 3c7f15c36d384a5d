"""Enhance-A-Video from the command's options to the clips: its active steps, and what clips depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.cli import main as cli
from jvgen.cli import sample as cli_sample
from jvgen.config import ConfigError, validate_tree
from jvgen.diffusion.guidance import GuidanceConfig
from jvgen.diffusion.objective import ObjectiveConfig
from jvgen.diffusion.sampler import SamplerConfig
from jvgen.diffusion.schedule import ScheduleConfig
from jvgen.models.byte_text.config import ByteTextConfig
from jvgen.models.video_dit.config import VideoDiTConfig
from jvgen.models.video_dit.enhance import EnhanceConfig
from jvgen.nested import map_with_path
from jvgen.tasks.text import TextConfig
from jvgen.tasks.text_to_video import TextToVideoConfig

pytestmark = pytest.mark.usefixtures("quick_compilations")

CONFIG = TextToVideoConfig(
    denoiser=VideoDiTConfig(
        layers=2, heads=2, head_width=8, in_channels=4, out_channels=4, text_width=8, text_length=6, condition_width=8,
    ),
    text=TextConfig(encoder=ByteTextConfig(width=8, layers=1, heads=2), length=6),
    spatial_compression=2,
    temporal_compression=1,
    schedule=ScheduleConfig(kind="rectified_flow"),
    objective=ObjectiveConfig(target="velocity"),
    sampler=SamplerConfig(kind="euler", steps=4),
    guidance=GuidanceConfig(kind="constant", scale=3.0),
)  # fmt: skip
STRONG = EnhanceConfig(temperature=20.0)


@pytest.fixture(scope="module")
def latents():
    """Latents of clips of some slots, by how attention is scaled."""
    task, rng = CONFIG.build(), np.random.default_rng(0)

    def draw(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        # Scales of the norms of queries and keys that make attention of one frame differ from that of another.
        start = 2.0 if path.endswith(("query_norm/scale", "key_norm/scale")) else 0.0
        return jnp.asarray(start + 0.3 * rng.standard_normal(leaf.shape), jnp.float32)

    parameters = {name: map_with_path(draw, network.shapes) for name, network in task.networks.items()}
    tokens = jnp.asarray(task.tokens(["a red ball", "a blue cube", "rain"]))

    def make(enhance: EnhanceConfig | None, slots: tuple[int, ...] = (0, 1), sampler=CONFIG.sampler) -> np.ndarray:
        run = jax.jit(
            lambda tokens, slots: task.generate_latents(
                parameters, {}, tokens, slots, jax.random.key(0), size=(4, 8, 8), sampler=sampler,
                guidance=CONFIG.guidance, enhance=enhance,
            )
        )  # fmt: skip
        return np.asarray(run(tokens[jnp.asarray(slots)], jnp.asarray(slots, jnp.int32))[0])

    return make


@pytest.fixture(scope="module")
def plain(latents):
    return latents(None)


def test_enhanced_clips_are_independent_of_their_batch(latents, plain):
    both = latents(STRONG)
    assert np.abs(both - plain).max() > 1e-2
    np.testing.assert_allclose(latents(STRONG, (0,)), both[:1], atol=1e-4)
    # As published a batch shares, and then it has.
    together = latents(STRONG.replace(share="batch"))
    np.testing.assert_allclose(latents(STRONG.replace(share="batch"), (0,)), both[:1], atol=1e-4)
    assert np.abs(together - both).max() > 1e-3


def test_steps_outside_the_schedule_are_unchanged(latents, plain):
    np.testing.assert_array_equal(latents(STRONG.replace(start=0.5, end=0.5)), plain)
    halves = [latents(STRONG.replace(start=start, end=end)) for start, end in ((0.0, 0.5), (0.5, 1.0))]
    whole = latents(STRONG)
    for half in halves:
        assert np.abs(half - plain).max() > 1e-3 and np.abs(half - whole).max() > 1e-3


def test_the_number_of_layers_is_checked():
    with pytest.raises(ConfigError, match="each of the 2"):
        validate_tree(CONFIG.replace(enhance=EnhanceConfig(layers=(1.0, 1.0, 1.0))))
    validate_tree(CONFIG.replace(enhance=EnhanceConfig(layers=(1.0, 0.0))))


@pytest.mark.parametrize(
    "words, wanted",
    [
        ([], None),
        (["--enhance", "3.4"], EnhanceConfig()),
        (["--enhance", "2", "--enhance-set", "start=0.2", "--enhance-set", "share=batch"],
         EnhanceConfig(temperature=2.0, start=0.2, share="batch")),
        (["--enhance-set", "gain=1.15"], EnhanceConfig(gain=1.15, share="head")),
        (["--enhance-set", "layers=1,0,0.5"], EnhanceConfig(layers=(1.0, 0.0, 0.5))),
    ],
)  # fmt: skip
def test_options_of_the_command(words, wanted):
    parsed = cli.build_parser().parse_args(["sample", "runs/x", "--out", "clips", *words])
    assert cli_sample.enhance_config(parsed) == wanted


def test_mistakes_in_options():
    for words, message in {"shar=head": "Did you mean share", "start=2": "start = 2.0"}.items():
        parsed = cli.build_parser().parse_args(["sample", "runs/x", "--out", "clips", "--enhance-set", words])
        with pytest.raises(ConfigError, match=message):
            cli_sample.enhance_config(parsed)
