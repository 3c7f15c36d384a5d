"""Whether a world model puts the candidates of a plan into the right order: what planning for rewards rests on.

    python -m tests.experiments.candidate_ranking --env metaworld:button-press-topdown-v3 --model WORLD

Rewards that correlate over whole episodes may do so without any knowledge of what an action is worth: they rise with
time. Here the environment's expert acts, with noise; every few steps candidates are drawn as the first round of a
search does, and the sums of their rewards in the simulator are compared with those that the world model predicts from
the frames alone. Averages over states: the rank correlation of the sums, and of the first and the last reward alone;
the share of the gain, of the best candidate over the average one, that the candidate has which the model likes best (1:
it is the best one, 0: one at random). The correlation of the states' means, which a score of whole episodes sees. And
what a component of an action is worth: slopes of the first reward over the first action, of the sum over the mean one.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jvgen.control.environments import open_environment
from jvgen.control.planning import PlannerConfig, draw
from jvgen.control.worlds import ImaginedWorld, SimulatedWorld
from jvgen.runs.world_models import load_world_model


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", required=True, help="with an expert and states to go back to")
    parser.add_argument("--model", type=Path, required=True, help="the learned world model")
    parser.add_argument("--episodes", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50, help="actions of an episode")
    parser.add_argument("--every", type=int, default=6, help="actions between two states that are looked at")
    parser.add_argument("--noise", type=float, default=0.6, help="standard deviation of the expert's noise")
    parser.add_argument("--candidates", type=int, default=40)
    parser.add_argument("--horizon", type=int, default=5, help="actions of a candidate")
    parsed = parser.parse_args(arguments)
    world = load_world_model(parsed.model, greedy=True)
    environment = open_environment(parsed.env, steps=parsed.steps, size=world.tokenizer.resolution)
    model = ImaginedWorld(world)
    simulator = SimulatedWorld(environment, world.action_width)
    search = PlannerConfig(
        samples=parsed.candidates, horizon=parsed.horizon, standard_deviation=(1.0,), correlation=0.3
    )
    shape = (parsed.horizon, world.action_width)
    predict = jax.jit(lambda weights, start, actions, key: model.predict(weights, start, actions, key, "none")[1])
    rng, found = np.random.default_rng(0), []
    for episode in range(parsed.episodes):
        frame, _ = environment.reset(seed=1000 * episode)
        frames = [frame] * world.context_frames
        for step in range(parsed.steps):
            if step % parsed.every == 0:
                key = jax.random.key(1000 * episode + step)
                bounds = jnp.asarray(model.low), jnp.asarray(model.high)
                candidates = draw(search, jnp.zeros(shape), jnp.ones(shape), *bounds, key)
                start = np.stack(frames[-world.context_frames :])
                predicted = np.asarray(predict(model.weights, start, candidates, key))
                true = np.asarray(simulator.predict((), None, candidates, key, "none")[1])
                found.append((np.asarray(candidates), true, predicted))
                print(f"episode {episode}, step {step}: {row(true, predicted)}", flush=True)
            action = environment.expert_action() + parsed.noise * rng.standard_normal(world.action_width)
            frames.append(environment.step(np.clip(action, -1, 1).astype(np.float32))[0])
    print(summary(found))
    return 0


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's; 0 where either is constant."""
    ranks = [np.unique(values, return_inverse=True)[1].astype(float) for values in (one, other)]
    if min(rank.std() for rank in ranks) == 0:
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def scores(true: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Of one state: rewards of candidates `R F`, true and predicted."""
    sums, guess = true.sum(axis=1), predicted.sum(axis=1)
    gain = sums.max() - sums.mean()
    return {
        "rank correlation": rank_correlation(sums, guess),
        "of the first reward": rank_correlation(true[:, 0], predicted[:, 0]),
        "of the last reward": rank_correlation(true[:, -1], predicted[:, -1]),
        "share of the best gain": float((sums[guess.argmax()] - sums.mean()) / gain) if gain else 0.0,
        "true mean": float(sums.mean()),
        "true deviation": float(sums.std()),
        "predicted mean": float(guess.mean()),
        "predicted deviation": float(guess.std()),
    }


def row(true: np.ndarray, predicted: np.ndarray) -> str:
    """A line about one state."""
    return ", ".join(f"{name} {value:.2f}" for name, value in scores(true, predicted).items())


def slopes(actions: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """Least squares of rewards `R` over actions `R A`: what a unit of each component adds."""
    return np.linalg.lstsq(np.c_[actions, np.ones(len(actions))], rewards, rcond=None)[0][:-1]


def summary(found: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> str:
    """Tables of all states: candidates `R F A`, true and predicted rewards `R F`."""
    each = [scores(true, predicted) for _, true, predicted in found]
    means = {name: np.mean([one[name] for one in each]) for name in each[0]}
    between = np.corrcoef([one["true mean"] for one in each], [one["predicted mean"] for one in each])[0, 1]
    lines = ["| | mean over states |", "|---|---|"]
    lines += [f"| {name} | {value:.2f} |" for name, value in means.items()]
    lines += [
        f"| correlation of the means of {len(found)} states | {between:.2f} |",
        "",
        "| slope | true | predicted |",
    ]
    lines += ["|---|---|---|"]
    for component in range(found[0][0].shape[-1]):
        of = {
            "first reward, first action": lambda actions, rewards: slopes(actions[:, 0], rewards[:, 0]),
            "sum, mean action": lambda actions, rewards: slopes(actions.mean(1), rewards.sum(1)),
        }
        for name, slope in of.items():
            values = [np.mean([slope(one[0], one[which])[component] for one in found]) for which in (1, 2)]
            lines.append(f"| {name}, component {component} | {values[0]:.2f} | {values[1]:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
