"""One update of DrQ-v2 against PyTorch: losses, all weights after it, target critics; shifts; initial weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.control.drq_v2 import DrQV2, DrQV2Config, shifted
from jvgen.control.replay import Transitions

SIDE, BATCH, ACTIONS = 20, 5, 3
CONFIG = DrQV2Config(frame_stack=2, channels=6, features=7, hidden=9, learning_rate=1e-2, weight_decay=1e-3, pad=2)


@pytest.fixture(scope="module")
def agent() -> DrQV2:
    return DrQV2(CONFIG, (SIDE, SIDE, 3), ACTIONS)


@pytest.fixture(scope="module")
def batch() -> Transitions:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, BATCH, SIDE, SIDE, 6), dtype=np.uint8)
    return Transitions(
        frames=jnp.asarray(frames[0]),
        actions=jnp.asarray(rng.uniform(-1, 1, (BATCH, ACTIONS)), jnp.float32),
        rewards=jnp.asarray(rng.normal(size=BATCH), jnp.float32),
        discounts=jnp.asarray(rng.uniform(0.9, 1, BATCH), jnp.float32),
        next_frames=jnp.asarray(frames[1]),
    )


@pytest.fixture(scope="module")
def updated(agent, batch):
    """State before, randomness, and two updates with the metrics of each."""
    state = agent.init(jax.random.key(1))
    # Biases that are not zero.
    noise = np.random.default_rng(1)
    perturb = lambda tree: jax.tree.map(lambda x: x + 0.1 * noise.normal(size=x.shape).astype(np.float32), tree)  # noqa: E731
    parameters = {name: perturb(value) for name, value in state.parameters.items()}
    state = state.__class__(parameters, perturb(state.target), state.optimizer, state.updates)
    update = jax.jit(agent.update)
    states, made = [state], []
    for number in range(2):
        random = agent.randomness(jax.random.key(number), BATCH)
        state, metrics = update(state, batch, 0.4, random)
        states.append(state)
        made.append((random, metrics))
    return states, made


@pytest.mark.torch
def test_two_updates_equal_torch(agent, batch, updated) -> None:
    """The published algorithm in PyTorch's modules, optimizers and order of steps, from the same weights and noise."""
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    states, made = updated
    networks = {name: torch_parameters(torch, value) for name, value in states[0].parameters.items()}
    target = torch_parameters(torch, states[0].target)
    for value in target.values():
        value.requires_grad_(False)
    adams = {
        name: torch.optim.Adam(list(value.values()), lr=CONFIG.learning_rate, weight_decay=CONFIG.weight_decay)
        for name, value in networks.items()
    }
    side = (SIDE - 3) // 2 + 1 - 6

    def encode(frames):
        x = frames / 255.0 - 0.5
        for layer in range(4):
            kernel, bias = (networks["encoder"][f"layers/{layer}/{part}"] for part in ("kernel", "bias"))
            x = F.relu(F.conv2d(x, kernel, bias, stride=1 if layer else 2))
        return x.reshape(len(x), -1)

    def trunk(weights, x):
        x = F.linear(x, weights["trunk/linear/kernel"], weights["trunk/linear/bias"])
        return torch.tanh(F.layer_norm(x, (CONFIG.features,), weights["trunk/norm/scale"], weights["trunk/norm/bias"]))

    def layers(weights, prefix, x):
        for layer in range(3):
            x = F.linear(x, weights[f"{prefix}/layers/{layer}/kernel"], weights[f"{prefix}/layers/{layer}/bias"])
            x = F.relu(x) if layer < 2 else x
        return x

    def act(encoded, noise):
        mean = torch.tanh(layers(networks["actor"], "policy", trunk(networks["actor"], encoded)))
        action = mean + torch.clamp(torch.from_numpy(np.array(noise)) * 0.4, -CONFIG.noise_limit, CONFIG.noise_limit)
        return action - action.detach() + torch.clamp(action, -1 + 1e-6, 1 - 1e-6).detach()

    def values(weights, encoded, actions):
        x = torch.cat([trunk(weights, encoded), actions], dim=-1)
        return [layers(weights, f"values/{number}", x)[:, 0] for number in range(2)]

    arrays = {name: torch.from_numpy(np.array(value)) for name, value in batch._asdict().items()}
    for number, (random, metrics) in enumerate(made):
        frames = torch_shifted(torch, arrays["frames"], random.shift)
        after = encode(torch_shifted(torch, arrays["next_frames"], random.next_shift)).detach()
        with torch.no_grad():
            wanted = arrays["rewards"] + arrays["discounts"] * torch.min(
                *values(target, after, act(after, random.next_noise))
            )
        encoded = encode(frames)
        loss = sum(F.mse_loss(value, wanted) for value in values(networks["critic"], encoded, arrays["actions"]))
        for name in ("encoder", "critic"):
            adams[name].zero_grad()
        loss.backward()
        adams["critic"].step()
        adams["encoder"].step()
        encoded = encoded.detach()
        actor_loss = -torch.min(*values(networks["critic"], encoded, act(encoded, random.noise))).mean()
        adams["actor"].zero_grad()
        actor_loss.backward()
        adams["actor"].step()
        if number == 0:
            check_gradients(torch, states[1].optimizer, networks, adams)
        for name, value in target.items():
            value.copy_(CONFIG.target_rate * networks["critic"][name].detach() + (1 - CONFIG.target_rate) * value)
        np.testing.assert_allclose(metrics["critic_loss"], loss.item(), rtol=1e-4)
        np.testing.assert_allclose(metrics["actor_loss"], actor_loss.item(), rtol=1e-4, atol=1e-5)
    assert side == 3
    for name, mine in {**states[2].parameters, "target": states[2].target}.items():
        theirs = target if name == "target" else networks[name]
        for path, value in torch_parameters(torch, mine).items():
            error = (value - theirs[path]).abs().max().item()
            assert error < 2e-4, f"{name}/{path}: {error}"
            moved = torch_parameters(torch, {**states[0].parameters, "target": states[0].target}[name])[path]
            assert (value - moved).abs().max() > 10 * error, f"{name}/{path} did not move"


def check_gradients(torch, optimizer, networks, adams) -> None:
    """After one update Adam's first moments are a tenth of the gradients, whose scale its step does not show."""
    for name, (_, (adam, *_)) in optimizer.items():
        for path, moment in torch_parameters(torch, adam.mu).items():
            theirs = adams[name].state[networks[name][path]]["exp_avg"]
            error, size = (moment - theirs).abs().max().item(), theirs.abs().max().item()
            assert error < 1e-4 * size, f"gradient of {name}/{path}: {error} of {size}"


def torch_parameters(torch, tree) -> dict:
    """Parameters by path, in PyTorch's layouts; the trunk reads features in the order channel, row, column."""
    flat = {}
    for path, value in jax.tree_util.tree_leaves_with_path(tree):
        name, array = "/".join(str(key.key) for key in path), np.array(value)
        if array.ndim == 4:
            array = array.transpose(3, 2, 0, 1)
        elif name.endswith("trunk/linear/kernel"):
            side = (SIDE - 3) // 2 + 1 - 6
            array = array.reshape(side, side, CONFIG.channels, -1).transpose(3, 2, 0, 1).reshape(array.shape[1], -1)
        elif array.ndim == 2:
            array = array.T
        flat[name] = torch.from_numpy(np.ascontiguousarray(array)).requires_grad_(True)
    return flat


def torch_shifted(torch, frames, shift, pad: int = CONFIG.pad):
    """Bilinear sampling of edge-padded frames at a grid moved by whole pixels: `B C H W`."""
    x = torch.nn.functional.pad(frames.permute(0, 3, 1, 2).float(), (pad,) * 4, "replicate")
    size, padded = frames.shape[1], frames.shape[1] + 2 * pad
    line = torch.linspace(-1 + 1 / padded, 1 - 1 / padded, padded)[:size]
    grid = torch.stack([line[None].repeat(size, 1), line[:, None].repeat(1, size)], dim=-1)[None].repeat(
        len(x), 1, 1, 1
    )
    moves = torch.from_numpy(np.array(shift)).flip(-1)[:, None, None].float() * 2 / padded
    return torch.nn.functional.grid_sample(x, grid + moves, padding_mode="zeros", align_corners=False)


@pytest.mark.torch
def test_shifts_equal_bilinear_sampling() -> None:
    torch = pytest.importorskip("torch")
    frames = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    shift = np.array([(y, x) for y in (0, 2, 4) for x in (0, 2, 4)])
    mine = shifted(jnp.asarray(frames), jnp.asarray(shift), 2)
    theirs = torch_shifted(torch, torch.from_numpy(frames), shift, 2).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(mine, theirs, atol=2e-2)
    np.testing.assert_array_equal(mine[4], frames[4])
    np.testing.assert_array_equal(mine[0, 2:, 2:], frames[0, :-2, :-2])


def test_initial_weights_are_orthogonal_and_targets_are_copies(agent) -> None:
    state = agent.init(jax.random.key(0))
    kernel = np.asarray(state.parameters["critic"]["values"]["1"]["layers"]["1"]["kernel"])
    np.testing.assert_allclose(kernel.T @ kernel, np.eye(9), atol=1e-5)
    window = np.asarray(state.parameters["encoder"]["layers"]["2"]["kernel"]).transpose(3, 2, 0, 1).reshape(6, -1)
    np.testing.assert_allclose(window @ window.T, 2 * np.eye(6), atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, state.target, state.parameters["critic"])
    assert int(state.updates) == 0


def test_published_sizes() -> None:
    """iVideoGPT's encoder of 64 pixels gives 20,000 features, DrQ-v2's of 84 pixels 39,200."""
    for side, features in ((64, 20_000), (84, 39_200)):
        agent = DrQV2(DrQV2Config(), (side, side, 3), 4)
        assert agent.networks["actor"].shapes["trunk"]["linear"]["kernel"].shape == (features, 50)
    config = DrQV2Config()
    assert [float(config.noise(step)) for step in (0, 50_000, 10**6)] == pytest.approx([1.0, 0.55, 0.1])


def test_actions(agent, batch) -> None:
    state = agent.init(jax.random.key(0))
    mean = agent.act(state.parameters, batch.frames)
    noisy = agent.act(state.parameters, batch.frames, jnp.full((BATCH, ACTIONS), 5.0))
    assert mean.shape == (BATCH, ACTIONS) and np.abs(mean).max() < 1 and np.asarray(noisy).min() > 0.99
    assert np.abs(noisy).max() < 1
    with pytest.raises(ValueError, match="15x15"):
        DrQV2(CONFIG, (14, 20, 3), 2)


def test_a_value_is_learned() -> None:
    """One state, one reward: the critics' values approach it, and the actor the action with the highest one."""
    config = CONFIG.replace(learning_rate=3e-3, weight_decay=0.0, target_rate=0.1)
    agent = DrQV2(config, (15, 15, 1), 1)
    rng = np.random.default_rng(0)
    state, update = agent.init(jax.random.key(0)), jax.jit(agent.update)
    frames = jnp.zeros((64, 15, 15, 2), jnp.uint8)
    for number in range(250):
        actions = rng.uniform(-1, 1, (64, 1)).astype(np.float32)
        rewards = 1 - np.square(actions[:, 0] - 0.5)
        batch = Transitions(frames, jnp.asarray(actions), jnp.asarray(rewards), jnp.zeros(64), frames)
        state, metrics = update(state, batch, 0.2, agent.randomness(jax.random.key(number), 64))
    assert float(metrics["critic_loss"]) < 0.1
    assert float(agent.act(state.parameters, frames[:1])[0, 0]) == pytest.approx(0.5, abs=0.25)
