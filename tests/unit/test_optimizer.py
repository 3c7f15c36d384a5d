"""Optimizers against optax and against formulas: schedules, decay, frozen parameters, multipliers, Muon's matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jvgen import nested
from jvgen.config import ConfigError
from jvgen.parallel.axes import EMBED, LAYERS, MLP, VOCABULARY
from jvgen.training.optimization import moments, optimizer, parameter_paths
from jvgen.training.optimization.muon import Matrices, Muon
from jvgen.training.optimization.optimizer import OptimizerConfig, make_optimizer

AXES = {
    "net": {
        "blocks": {"kernel": (LAYERS, EMBED, MLP), "scale": (LAYERS, EMBED)},
        "conv": {"kernel": (None, None, EMBED, MLP), "bias": (MLP,)},
        "text": {"embedding": (VOCABULARY, EMBED)},
        "out": {"kernel": (EMBED, MLP)},
    }
}
SHAPES = {
    "net": {
        "blocks": {"kernel": (3, 8, 4), "scale": (3, 8)},
        "conv": {"kernel": (3, 3, 2, 5), "bias": (5,)},
        "text": {"embedding": (10, 8)},
        "out": {"kernel": (8, 6)},
    }
}


def random_tree(seed: int):
    rng = np.random.default_rng(seed)
    return nested.map_with_path(lambda _, s: jnp.asarray(rng.standard_normal(s), jnp.float32), SHAPES)


def run(config: OptimizerConfig, updates: int = 3):
    made = make_optimizer(config, AXES, 100)
    parameters, _ = nested.split(random_tree(0), made.trainable)
    state = made.init(parameters)
    update = jax.jit(made.update)
    for number in range(updates):
        gradients = nested.select(random_tree(number + 1), parameters)
        moves, state = update(gradients, state, parameters, jnp.float32(0.1))
        parameters = jax.tree.map(jnp.add, parameters, moves)
    return nested.flatten(parameters), state


def test_adamw_is_optax_adamw():
    mask = nested.map_with_path(lambda path, _: path.endswith("kernel"), SHAPES)
    reference = optax.adamw(0.1, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05, mask=mask)
    expected = random_tree(0)
    state = reference.init(expected)
    for number in range(3):
        with jax.numpy_dtype_promotion("standard"):
            moves, state = jax.jit(reference.update)(random_tree(number + 1), state, expected)
        expected = optax.apply_updates(expected, moves)
    ours, _ = run(OptimizerConfig(weight_decay=0.05))
    for path, value in nested.flatten(expected).items():
        np.testing.assert_allclose(ours[path], value, rtol=2e-6, atol=1e-6, err_msg=path)


def test_bfloat16_moments_are_those_of_float32_rounded():
    config = OptimizerConfig(weight_decay=0.0)
    exact, exact_state = run(config, 5)
    found, state = run(config.replace(first_moment="bfloat16", second_moment="bfloat16"), 5)
    names, exact_names = parameter_paths.name_leaves(state), parameter_paths.name_leaves(exact_state)
    # The names of a checkpoint stay, and what is in it tells its dtype.
    assert list(names) == list(exact_names)
    for name, leaf in names.items():
        if name.startswith(("adam/mu/", "adam/nu/")):
            assert leaf.dtype == jnp.bfloat16
            np.testing.assert_allclose(leaf.astype(jnp.float32), exact_names[name], rtol=0.03, atol=0.01)
    start = nested.flatten(random_tree(0))
    for path, value in exact.items():
        moved = np.linalg.norm(value - start[path])
        assert 0 < np.linalg.norm(found[path] - value) < 0.01 * moved, path


def test_a_factored_second_moment_is_exact_for_squares_of_rank_one(monkeypatch):
    """Squared gradients that are a product of a row and a column: the factored moment is the whole one."""
    monkeypatch.setattr(moments, "SMALLEST_FACTORED", 4)
    axes = {"stack": {"kernel": (LAYERS, EMBED, MLP)}, "window": {"kernel": (None, EMBED, MLP)}, "bias": (MLP,)}
    rng = np.random.default_rng(0)
    rows, columns = rng.uniform(0.1, 2, (3, 8, 1)), rng.uniform(0.1, 2, (3, 1, 4))
    kernel = jnp.asarray(rows * columns * rng.choice([-1, 1], (3, 8, 4)), jnp.float32)
    gradients = {"stack": {"kernel": kernel}, "window": {"kernel": kernel}, "bias": jnp.arange(4, dtype=jnp.float32)}
    parameters = jax.tree.map(jnp.zeros_like, gradients)
    results = {}
    for second in ("float32", "factored"):
        made = make_optimizer(OptimizerConfig(weight_decay=0.0, second_moment=second), axes, 10)
        state = made.init(parameters)
        for scale in (1.0, 0.5):
            moves, state = jax.jit(made.update)(
                jax.tree.map(lambda g, s=scale: g * s, gradients), state, parameters, jnp.float32(0.1)
            )
        results[second] = moves, parameter_paths.name_leaves(state)
    for path, move in nested.flatten(results["float32"][0]).items():
        np.testing.assert_allclose(nested.flatten(results["factored"][0])[path], move, rtol=1e-5, err_msg=path)
    names = {name: leaf.shape for name, leaf in results["factored"][1].items() if name.startswith("adam/nu")}
    assert names == {
        "adam/nu/bias": (4,),
        "adam/nu/stack/kernel/columns": (3, 4), "adam/nu/stack/kernel/rows": (3, 8),
        "adam/nu/window/kernel/columns": (3, 4), "adam/nu/window/kernel/rows": (3, 8),
    }  # fmt: skip


def test_a_factored_second_moment_of_gradients_that_are_zero_or_tiny_is_finite(monkeypatch):
    monkeypatch.setattr(moments, "SMALLEST_FACTORED", 2)
    made = make_optimizer(OptimizerConfig(second_moment="factored"), {"kernel": (EMBED, MLP)}, 10)
    parameters = {"kernel": jnp.ones((2, 2))}
    state = made.init(parameters)
    for value in (0.0, 1e-18, 1e-30):
        gradient = {"kernel": jnp.full((2, 2), value, jnp.float32).at[0].set(0)}
        moves, state = made.update(gradient, state, parameters, jnp.float32(0.1))
        assert np.isfinite(moves["kernel"]).all()


def test_a_second_moment_that_rounding_would_stop_is_refused():
    with pytest.raises(ValueError, match="second_moment = bfloat16 with beta2 = 0.999.*at most 0.98"):
        OptimizerConfig(second_moment="bfloat16", beta2=0.999).validate()


def test_muons_momentum_is_kept_in_the_dtype_of_the_first_moment():
    _, state = run(OptimizerConfig(kind="muon", first_moment="bfloat16"))
    assert parameter_paths.name_leaves(state)["muon/mu/net/out/kernel"].dtype == jnp.bfloat16


def test_stacked_norm_scales_do_not_decay_although_they_have_two_axes():
    with_decay, _ = run(OptimizerConfig(weight_decay=0.5))
    without, _ = run(OptimizerConfig(weight_decay=0.0))
    for path in with_decay:
        assert np.array_equal(with_decay[path], without[path]) != path.endswith("kernel"), path


def test_an_embedding_does_not_decay_whatever_its_name():
    config = OptimizerConfig(weight_decay=0.5, no_weight_decay=())
    assert np.array_equal(
        run(config)[0]["net/text/embedding"], run(config.replace(weight_decay=0.0))[0]["net/text/embedding"]
    )


def test_frozen_parameters_have_no_moments():
    ours, state = run(OptimizerConfig(frozen=("net/conv/", "net/text/")))
    assert set(ours) == {"net/blocks/kernel", "net/blocks/scale", "net/out/kernel"}
    moments = parameter_paths.name_leaves(state)
    assert "adam/mu/net/out/kernel" in moments and not any("conv" in name or "text" in name for name in moments)


def test_multipliers_scale_the_learning_rate_and_the_first_match_counts():
    plain, _ = run(OptimizerConfig(weight_decay=0.0), 1)
    config = OptimizerConfig(weight_decay=0.0, multipliers={"net/out": 0.5, "net/": 2.0})
    scaled, _ = run(config, 1)
    start = nested.flatten(random_tree(0))
    for path in plain:
        factor = 0.5 if path.startswith("net/out") else 2.0
        np.testing.assert_allclose(
            scaled[path] - start[path], factor * (plain[path] - start[path]), rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize("field", ["frozen", "multipliers", "muon_exclude", "muon_blocks"])
def test_a_pattern_without_effect_is_a_mistake(field):
    value = {"multipliers": {"net/bloks": 0.5}, "muon_blocks": {"net/bloks": 2}}.get(field, ("net/bloks",))
    with pytest.raises(ConfigError, match="net/bloks.*matches no parameter"):
        make_optimizer(OptimizerConfig(**{field: value}), AXES, 100)


def test_freezing_everything_is_a_mistake():
    with pytest.raises(ConfigError, match="nothing is left to train"):
        make_optimizer(OptimizerConfig(frozen=("net",)), AXES, 100)


def test_muon_treats_each_stacked_layer_as_a_separate_matrix():
    """A stack of three layers is updated as three single kernels are."""
    config = OptimizerConfig(kind="muon", weight_decay=0.0)
    stacked, state = run(config)
    made = make_optimizer(config, {"kernel": (EMBED, MLP)}, 100)
    update = jax.jit(made.update)
    for layer in range(3):
        kernel = {"kernel": random_tree(0)["net"]["blocks"]["kernel"][layer]}
        alone = made.init(kernel)
        for number in range(3):
            gradient = {"kernel": random_tree(number + 1)["net"]["blocks"]["kernel"][layer]}
            moves, alone = update(gradient, alone, kernel, jnp.float32(0.1))
            kernel = jax.tree.map(jnp.add, kernel, moves)
        np.testing.assert_allclose(stacked["net/blocks/kernel"][layer], kernel["kernel"], atol=1e-6)
    names = parameter_paths.name_leaves(state)
    assert "muon/mu/net/blocks/kernel" in names and "muon/mu/net/conv/kernel" in names
    assert "adam/mu/net/text/embedding" in names and "adam/mu/net/blocks/scale" in names


def test_muon_directions_are_orthogonal_with_the_stated_size():
    config = OptimizerConfig(kind="muon", weight_decay=0.0, muon_rms=0.2)
    start = nested.flatten(random_tree(0))
    updated, _ = run(config, 1)
    for path, matrix in {
        "net/out/kernel": lambda x: x,
        "net/conv/kernel": lambda x: x.reshape(18, 5),
        "net/blocks/kernel": lambda x: x[1],
    }.items():
        step = (
            matrix(np.asarray(updated[path] - start[path]))
            / -0.1
            / 0.2
            / np.sqrt(max(matrix(np.asarray(start[path])).shape))
        )
        singular = np.linalg.svd(step, compute_uv=False)
        # Five Newton-Schulz iterations leave singular values around one, from a spread of condition 5 and more.
        assert singular.min() > 0.6 and singular.max() < 1.3, (path, singular)


def test_muon_is_optax_muon():
    """Momentum, its look-ahead and the iterations, over several steps."""
    tree = {"net": {"out": random_tree(0)["net"]["out"]}}
    numbers = {"net": {"out": {"kernel": optax.contrib.MuonDimensionNumbers()}}}
    reference = optax.contrib.scale_by_muon(beta=0.95, ns_steps=5, weight_dimension_numbers=numbers)
    ours = Muon({"net/out/kernel": Matrices((EMBED, MLP))}, momentum=0.95, iterations=5, rms=0.2)
    update = jax.jit(ours.update)
    state, expected_state = ours.init(tree), reference.init(tree)
    for number in range(3):
        gradient = {"net": {"out": random_tree(number + 1)["net"]["out"]}}
        with jax.numpy_dtype_promotion("standard"):
            expected, expected_state = jax.jit(reference.update)(gradient, expected_state)
        found, state = update(gradient, state)
        scaled = expected["net"]["out"]["kernel"] * 0.2 * np.sqrt(8)
        np.testing.assert_allclose(found["net"]["out"]["kernel"], scaled, atol=2e-6)
    assert parameter_paths.name_leaves(state).keys() == parameter_paths.name_leaves(expected_state).keys()


def test_muon_blocks_are_orthogonalized_apart():
    """A kernel of two blocks of output features is updated as two kernels are."""
    config = OptimizerConfig(kind="muon", weight_decay=0.0, muon_blocks={"net/(blocks|out)": 2})
    start, (updated, _) = nested.flatten(random_tree(0)), run(config, 1)
    alone = make_optimizer(config.replace(muon_blocks={}), {"kernel": (EMBED, MLP)}, 100)
    update = jax.jit(alone.update)
    for block in (slice(0, 3), slice(3, 6)):
        kernel = {"kernel": start["net/out/kernel"][:, block]}
        gradient = {"kernel": random_tree(1)["net"]["out"]["kernel"][:, block]}
        expected, _ = update(gradient, alone.init(kernel), kernel, jnp.float32(0.1))
        moved = updated["net/out/kernel"][:, block] - start["net/out/kernel"][:, block]
        np.testing.assert_allclose(moved, expected["kernel"], atol=1e-6)
    whole, _ = run(config.replace(muon_blocks={}), 1)
    assert not np.allclose(updated["net/blocks/kernel"], whole["net/blocks/kernel"], atol=1e-3)
    np.testing.assert_array_equal(updated["net/conv/kernel"], whole["net/conv/kernel"])
    with pytest.raises(ConfigError, match="net/out/kernel has 6 output features, which 4 blocks do not divide"):
        run(config.replace(muon_blocks={"net/out": 4}), 1)


def test_muon_exclude_leaves_a_kernel_to_adamw():
    _, state = run(OptimizerConfig(kind="muon", muon_exclude=("net/out",)))
    names = parameter_paths.name_leaves(state)
    assert "adam/mu/net/out/kernel" in names and "muon/mu/net/out/kernel" not in names


@pytest.mark.parametrize(
    ("schedule", "at"),
    [
        ("constant", {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 99: 1.0}),
        ("linear", {9: 1.0, 10: 1.0, 99: 0.1, 150: 0.1}),
        ("cosine", {9: 1.0, 10: 1.0, 99: 0.1, 150: 0.1}),
        ("wsd", {9: 1.0, 50: 1.0, 80: 1.0, 99: 0.1, 150: 0.1}),
    ],
)
def test_schedules_at_the_points_that_define_them(schedule, at):
    config = OptimizerConfig(
        learning_rate=2.0, schedule=schedule, warmup_steps=10, final_fraction=0.1, decay_fraction=0.2
    )
    rate = jax.jit(optimizer.make_schedule(config, 100))
    for step, expected in at.items():
        np.testing.assert_allclose(rate(jnp.int32(step)), 2.0 * expected, rtol=1e-5, err_msg=f"{schedule} at {step}")


@pytest.mark.parametrize(
    ("changes", "steps", "rates"),
    [
        ({"schedule": "wsd", "decay_fraction": 0.1, "warmup_steps": 0}, 10, [1.0] * 9 + [0.25]),
        ({"schedule": "cosine", "warmup_steps": 3}, 4, [1 / 3, 2 / 3, 1.0, 0.25]),
        ({"schedule": "linear", "warmup_steps": 0}, 2, [1.0, 0.25]),
        ({"schedule": "linear", "warmup_steps": 0}, 1, [1.0]),
        ({"schedule": "cosine", "warmup_steps": 4}, 4, [0.25, 0.5, 0.75, 1.0]),
    ],
)
def test_a_decay_of_one_step_ends_at_the_final_fraction(changes, steps, rates):
    config = OptimizerConfig(learning_rate=1.0, final_fraction=0.25, **changes)
    schedule = optimizer.make_schedule(config, steps)
    np.testing.assert_allclose([schedule(jnp.int32(step)) for step in range(steps)], rates, rtol=1e-6)


def test_cosine_is_halfway_in_the_middle():
    config = OptimizerConfig(learning_rate=1.0, schedule="cosine", warmup_steps=0, final_fraction=0.0)
    np.testing.assert_allclose(optimizer.make_schedule(config, 101)(jnp.int32(50)), 0.5, atol=1e-6)


def test_clipping_keeps_direction_and_limits_the_norm():
    gradients = random_tree(3)
    norm = optimizer.global_norm(gradients)
    clipped = optimizer.clip(gradients, norm, 0.5)
    np.testing.assert_allclose(optimizer.global_norm(clipped), 0.5, rtol=1e-5)
    np.testing.assert_allclose(
        clipped["net"]["out"]["kernel"] * norm / 0.5, gradients["net"]["out"]["kernel"], rtol=1e-5
    )
    same = optimizer.clip(gradients, norm, float(norm) * 2)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), same, gradients))


@pytest.mark.parametrize(
    ("field", "value"),
    [("learning_rate", 0.0), ("beta1", 1.0), ("clip_norm", -1.0), ("frozen", ("(",)), ("decay_fraction", 2.0)],
)
def test_settings_that_cannot_work_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        OptimizerConfig(**{field: value}).validate()
