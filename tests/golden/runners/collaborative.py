"""CVD's inference for two, four and six videos: the released pipelines around a closed-form model."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from case_fields import check_fields, tensors
from einops import rearrange
from rounding import EPSILON

from jvgen.diffusion.collaborative import PairingConfig, Rounds, partners_of, repeated, trajectory
from jvgen.diffusion.guidance import GuidanceConfig, guided
from jvgen.diffusion.sampler import SamplerConfig, coefficients
from jvgen.diffusion.schedule import ScheduleConfig
from jvgen.geometry import paths, plucker
from jvgen.geometry.cameras import Cameras, centers, inverse
from jvgen.geometry.epipolar import fundamental_matrices

TERMS = ("x", "x_partner", "t/1000", "text", "pose", "F[0,2]")
PATHS = {"circle": "circle", "upper_hemi": "hemisphere", "interpolate": "interpolate"}


def serves(name: str, config: dict) -> bool:
    return name.startswith("collaborative_inference")


def run(case) -> None:
    check_fields(case.config, "config.json", read=("scheduler", "image_side", "runs", "closed_form_model"),
                 about=("latent_side",))  # fmt: skip
    gains = _gains(case.config["closed_form_model"])
    made = case.config["scheduler"]
    check_fields(
        made, "scheduler", read=("beta_start", "beta_end", "steps_offset", "eta"), about=("class",),
        fixed={"num_train_timesteps": 1000, "beta_schedule": "linear", "clip_sample": False, "set_alpha_to_one": True},
    )  # fmt: skip
    schedule = ScheduleConfig(kind="linear", beta_start=made["beta_start"], beta_end=made["beta_end"]).build()
    size = (case.config["image_side"],) * 2
    for settings in case.config["runs"]:
        name = settings["name"]
        taken = ("name", "view_num", "multistep", "accumulate_step", "cam_pattern", "steps", "length", "guidance",
                 "evaluations", "camera_dist")  # fmt: skip
        about = ("inner_steps", "batch_order_in_model", "independent_replay_max_abs_diff")
        check_fields(settings, f"runs.{name}", read=taken, about=about, fixed={"scheduler_step_kwargs": {}})
        read = tensors(case.io, f"{name}.")
        np.testing.assert_allclose(schedule.alpha_bar, read["alphas_cumprod"], rtol=2e-6)
        sampler = SamplerConfig(
            kind="ddim",
            steps=settings["steps"],
            spacing="leading",
            eta=float(made["eta"]),
            steps_offset=made["steps_offset"],
            step_to="stride",
        )
        cameras = _cameras(settings, read, size)
        if "eval.partner" in read:
            partner = np.asarray(jax.jit(jax.vmap(partners_of))(read["eval.permutation"]))
            np.testing.assert_array_equal(partner, read["eval.partner"])
            matrices = jax.jit(jax.vmap(lambda row, cameras=cameras: _matrices(cameras, row, size)))(partner)
            expected = read["eval.F_mats"]
            # What the distance of two cameras is smaller than that from the origin is lost.
            places = np.asarray(centers(cameras.extrinsics), np.float64)
            apart = np.abs(places[:, None] - places[None]).max()
            off = 16 * EPSILON * (1 + np.abs(places).max() / apart) * np.abs(expected).max()
            np.testing.assert_allclose(matrices, expected, rtol=0, atol=off)
        else:
            partner = np.tile(np.array([1, 0]), (settings["evaluations"], 1))
        _follow(settings, gains, read, sampler, schedule, cameras, partner, size)


def _gains(formula: str) -> list[float]:
    """The factors of `TERMS` in a formula "eps = 0.5*x + 0.3*x_partner + ...; ..."."""
    found = re.findall(r"(-?[\d.]+)\*([^\s;+]+)", formula.split(";")[0])
    assert tuple(term for _, term in found) == TERMS, (
        f"closed_form_model = {formula!r}: only sums of {TERMS} are supported"
    )
    return [float(factor) for factor, _ in found]


def _cameras(settings: dict, read: dict, size: tuple[int, int]) -> Cameras:
    views, frames = settings["view_num"], settings["length"]
    poses = inverse(read["c2w"][0][:, :3]).reshape(views, frames, 3, 4)
    at = read["K_mats"].reshape(views, frames, 3, 3)[..., [0, 1, 0, 1], [0, 1, 2, 2]] / [*size[::-1], *size[::-1]]
    cameras = Cameras(jnp.float32(at), jnp.float32(poses))
    if "cam_pattern" in settings:
        named = paths.named_paths(
            PATHS[settings["cam_pattern"]], views, frames, float(settings.get("camera_dist", 0.5))
        )
        np.testing.assert_allclose(named, poses, atol=2e-6)
        np.testing.assert_allclose(paths.default_intrinsics(views, frames, 1.0), at, rtol=1e-5)
        rays = jax.jit(plucker.rays, static_argnums=1)(Cameras(cameras.intrinsics, jnp.float32(named)), size)
        np.testing.assert_allclose(rearrange(rays, "v f h w c -> v c f h w"), read["plucker"], atol=5e-6)
    return cameras


def _matrices(cameras: Cameras, partner: jax.Array, size: tuple[int, int]) -> jax.Array:
    return fundamental_matrices(cameras, Cameras(*(part[partner] for part in cameras)), size)


def _follow(settings, gains, read, sampler, schedule, cameras, partner, size) -> None:
    """The whole trajectory with the matchings and the noise that were drawn there."""
    views, repeats, rounds = settings["view_num"], settings.get("multistep", 1), settings.get("accumulate_step", 1)
    pairing = PairingConfig(matchings=rounds, repeats=repeats)
    assert pairing.evaluations(views, sampler.steps) == settings["evaluations"] == len(partner)
    guidance = GuidanceConfig(scale=float(settings["guidance"]))
    guidance = guidance.replace(kind="constant")
    table = coefficients(sampler, schedule, "epsilon", guidance)
    steps = repeated(sampler, schedule, repeats)
    np.testing.assert_array_equal(table.timesteps, read["timesteps"])
    np.testing.assert_array_equal(table.timesteps[steps.step], read["inner.timestep"])
    noise = np.zeros((len(steps.step), *read["latents_init"].shape), np.float32)
    if repeats > 1:
        noise[steps.fresh > 0] = read["renoise"]
    by_step = jnp.asarray(partner.reshape(-1, rounds, views), jnp.int32)
    weight = jnp.full((rounds, views), 1.0 / rounds)
    pose = jnp.asarray(read["pose_feature"].reshape(views, 1, settings["length"], *read["latents_init"].shape[-2:]))

    def denoise(noisy, timesteps, scale, partner, key):
        matrices = _pair_matrices(read, cameras, partner, size)

        def network(noisy, timesteps, text):
            per_clip = noisy.reshape(views, 2, *noisy.shape[1:])
            other = per_clip[partner].reshape(noisy.shape)
            entry = jnp.repeat(matrices[..., 0, 2], 2, axis=0)[:, None, :, None, None]
            own, of_partner, of_time, of_text, of_pose, of_matrix = gains
            rest = (of_time * timesteps / 1000 + of_text * text).reshape(-1, 1, 1, 1, 1)
            return own * noisy + of_partner * other + rest + of_pose * jnp.repeat(pose, 2, axis=0) + of_matrix * entry

        ones = jnp.ones((views,))
        return guided(network, conditional=ones, unconditional=0 * ones)(noisy, timesteps, scale)

    run = jax.jit(
        lambda start: trajectory(
            denoise, start, views=views, schedule=schedule, sampler=sampler, prediction="epsilon", pairing=pairing,
            guidance=guidance, key=jax.random.key(0), keep=True,
            matchings=lambda inner: Rounds(by_step[inner], weight), fresh_noise=lambda inner: jnp.asarray(noise)[inner],
        )
    )  # fmt: skip
    final, (noisy, clean, arrived), *_ = run(jnp.asarray(read["latents_init"]))
    of_noisy, of_prediction = (
        column[steps.step].reshape(-1, *[1] * 5) for column in (table.clean_of_noisy, table.clean_of_prediction)
    )
    predicted = (np.asarray(clean, np.float64) - of_noisy * np.asarray(noisy, np.float64)) / of_prediction
    # The case says where another float32 program ends that makes the same draws.
    atol = max(1e-4, 8 * settings.get("independent_replay_max_abs_diff", 0.0))
    for ours, theirs in (
        (noisy, "inner.latents_in"),
        (predicted, "inner.noise_pred"),
        (arrived, "inner.denoised_step"),
        (final, "latents_final"),
    ):
        np.testing.assert_allclose(ours, read[theirs], atol=atol, rtol=1e-5, err_msg=f"{settings['name']} {theirs}")


def _pair_matrices(read, cameras, partner, size):
    """For two videos the released code takes the first one's matrix, turned, for the second."""
    if "F_mats" in read:
        return jnp.asarray(read["F_mats"])
    return _matrices(cameras, partner, size)
