"""The loss and all gradients of every CogVideoX preset against the released training step, by hand in torch."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.diffusion import objective
from jvgen.interop.from_torch import import_folder
from jvgen.models.video_dit.torch_map import weight_map
from jvgen.tasks import given_frames
from jvgen.tasks.pipeline_folder import read_pipeline

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parent))
from test_image_to_video import CASES, CHANNELS, FRAMES, HEIGHT, ROTARY, WIDTH, Case, tiny_pipeline  # noqa: E402
from test_pipeline import LENGTH  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("quick_compilations")]

TEXT = "CogVideoXPipeline"
PRESETS = {
    "2B": Case(TEXT, {}),
    "5B": Case(TEXT, ROTARY, "CogVideoXDPMScheduler"),
    "1.5": Case(TEXT, ROTARY | {"patch_size_t": 2, "patch_bias": False}),
    "5B-I2V": CASES["5b"],
    "1.5-I2V": CASES["1.5"],
}


@pytest.mark.parametrize("name", PRESETS)
def test_loss_and_gradients_equal_those_of_the_published_training(name, tmp_path, monkeypatch):
    """Padding, noised image, offset, v-prediction; latents are cached, given frames encoded in the step."""
    pipeline, folder = tiny_pipeline(PRESETS[name]), tmp_path / "pipeline"
    pipeline.save_pretrained(folder)
    config = read_pipeline(folder).replace(caption_dropout=0.0, condition_dropout=0.0, sample_posterior=False)
    task = config.replace(latents="data").build()
    rng = np.random.default_rng(5)
    moments = rng.standard_normal((2, *config.latent_shape(FRAMES, HEIGHT, WIDTH), 2 * CHANNELS)).astype(np.float32)
    frames = rng.integers(0, 256, (2, 1, HEIGHT, WIDTH, 3), np.uint8)
    text = rng.standard_normal((2, LENGTH, 16)).astype(np.float32)
    key, slots = jax.random.key(4), jnp.arange(2)
    drawn = {}

    def kept(name, function):
        def call(*arguments, **options):
            drawn[name] = function(*arguments, **options)
            return drawn[name]

        return call

    for part in ("draw_noise", "draw_timesteps"):
        monkeypatch.setattr(f"jvgen.tasks.text_to_video.{part}", kept(part, getattr(objective, part)))
    monkeypatch.setattr("jvgen.tasks.given_frames.noised", kept("frames", given_frames.noised))
    monkeypatch.setattr(type(task), "text_embeddings", lambda self, *arguments, **options: jnp.asarray(text))
    parameters = {"denoiser": import_folder(folder / "transformer")[1]}
    frozen = {"vae": import_folder(folder / "vae")[1]}
    batch = {"latents": jnp.asarray(moments), "tokens": jnp.zeros((2, LENGTH), jnp.int32), "slot": slots}
    if name.endswith("I2V"):
        batch["given"] = jnp.asarray(frames)

    def loss(parameters, frozen, batch):
        value = task.loss(parameters, frozen, batch, key)[0]
        return value, dict(drawn)

    (ours, made), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(parameters, frozen, batch)

    vae, transformer = pipeline.vae, pipeline.transformer
    channels_first = lambda array: torch.from_numpy(np.array(array).transpose(0, 4, 1, 2, 3).copy())  # noqa: E731
    clean = channels_first(moments[..., :CHANNELS]).permute(0, 2, 1, 3, 4) * vae.config.scaling_factor
    if (pairs := transformer.config.patch_size_t) is not None:
        clean = torch.cat([clean[:, :1].repeat(1, clean.shape[1] % pairs, 1, 1, 1), clean], dim=1)
    noise = channels_first(made["draw_noise"]).permute(0, 2, 1, 3, 4)
    timesteps = torch.from_numpy(np.array(made["draw_timesteps"])).long()
    noisy = pipeline.scheduler.add_noise(clean, noise, timesteps)
    inputs, rotary = noisy, None
    if name.endswith("I2V"):
        with torch.no_grad():
            image = vae.encode(channels_first(made["frames"])).latent_dist.mode().permute(0, 2, 1, 3, 4)
        scale = vae.config.scaling_factor
        image = image / scale if vae.config.invert_scale_latents else image * scale
        zeros = image.new_zeros(image.shape[0], clean.shape[1] - 1, *image.shape[2:])
        inputs = torch.cat([noisy, torch.cat([image, zeros], dim=1)], dim=2)
    if transformer.config.use_rotary_positional_embeddings:
        rotary = pipeline._prepare_rotary_positional_embeddings(HEIGHT, WIDTH, clean.shape[1], torch.device("cpu"))
    predicted = transformer(
        hidden_states=inputs, encoder_hidden_states=torch.from_numpy(text), timestep=timesteps,
        ofs=torch.full((1,), 2.0) if transformer.config.ofs_embed_dim else None, image_rotary_emb=rotary,
        return_dict=False,
    )[0]  # fmt: skip
    theirs = torch.nn.functional.mse_loss(predicted, pipeline.scheduler.get_velocity(clean, noise, timesteps))
    transformer.zero_grad()
    theirs.backward()
    np.testing.assert_allclose(float(ours), theirs.item(), rtol=1e-5)
    named = dict(weight_map(task.config.denoiser).to_torch(gradients["denoiser"]))
    expected = {tensor: parameter.grad.numpy() for tensor, parameter in transformer.named_parameters()}
    largest = max(np.abs(gradient).max() for gradient in expected.values())
    assert set(expected) <= set(named)
    for tensor, gradient in expected.items():
        np.testing.assert_allclose(named[tensor], gradient, atol=1e-4 * largest, rtol=1e-3, err_msg=tensor)
