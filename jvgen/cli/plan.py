"""`jvgen plan`: control an environment by planning in a world model."""

import argparse

from jvgen.cli.arguments import add_checkpoint_arguments, add_command, add_set_argument, number, path
from jvgen.value_rules import Count, Frames, Seed

# Flags that only planning in a model uses, and fields of the search that only one method does.
OF_MODEL = ("ema", "step", "frames", "greedy", "rows_at_once", "allow_other_data")
OF_METHOD = {"gamma": "mppi", "elites": "cem", "minimum_deviation": "cem"}
COSTS = ("pixels", "last-pixels", "laplacian", "lpips", "reward")


def add_commands(commands) -> None:
    """Add `plan`."""
    parser = add_command(
        commands, "plan", "control an environment by planning in a world model, and write what it did",
        "jvgen plan runs/world --env data/scenes --episodes 10 --out plans",
        "jvgen plan runs/world --env my_robot:make --goal goal.png --method cem --set samples=500 --out plans",
        details="At every step candidates are drawn, the world model predicts them, and the first action of the best "
        "plan is taken. Writes videos of the real frames beside the expected ones and the goal, a picture of the first "
        "plan's candidates, and summary.json.",
        handler=run_plan,
    )  # fmt: skip
    parser.add_argument(
        "model", type=path, nargs="?", metavar="MODEL",
        help="run directory of a world model, or a folder with exported tokenizer/ and transformer/; none with "
        "--with simulator or random",
    )  # fmt: skip
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--allow-other-data", action="store_true",
        help="plan even where the run was trained on recordings of another camera, look or action scale",
    )  # fmt: skip
    parser.add_argument("--greedy", action="store_true", help="predict the most likely tokens instead of sampled ones")
    parser.add_argument(
        "--frames", type=number(Frames), metavar="N",
        help="longest sequence in frames, context included; if omitted the run's, or all positions of an export",
    )  # fmt: skip
    task = parser.add_argument_group("what is controlled")
    task.add_argument(
        "--env", required=True, metavar="NAME",
        help="folder of a data set of scenes with driven ones; metaworld:TASK[:CAMERA], such as metaworld:reach-v3; or "
        "MODULE:FUNCTION that returns a gymnasium.Env with frames as observations",
    )  # fmt: skip
    task.add_argument("--goal", type=path, metavar="FILE", help="goal image; the environment's own if omitted")
    task.add_argument("--episodes", type=number(Count), default=1, metavar="N", help="number of episodes")
    task.add_argument("--steps", type=number(Count), default=15, metavar="N", help="actions per episode")
    task.add_argument("--seed", type=number(Seed), default=0, metavar="N", help="random seed of episodes and plans")
    search = parser.add_argument_group("the search")
    search.add_argument(
        "--method", choices=("mppi", "cem"), default="mppi",
        help="start from VP2's numbers for this method: MPPI with one round of 200 candidates, CEM with three",
    )  # fmt: skip
    add_set_argument(
        search, "FIELD=VALUE", "override one field of the search: samples, horizon, iterations, gamma, ... (repeatable)"
    )
    search.add_argument(
        "--cost", choices=COSTS, default="pixels",
        help="what plans are judged by: distance of all frames, or of the last, from the goal; predicted rewards",
    )  # fmt: skip
    search.add_argument("--lpips", type=path, metavar="FILE", help="weights for --cost lpips (see `jvgen lpips`)")
    search.add_argument(
        "--rows-at-once",
        type=number(Count),
        metavar="N",
        help="candidates predicted at a time (memory); all if omitted",
    )
    search.add_argument(
        "--with", dest="way", choices=("model", "simulator", "random"), default="model",
        help="predict with the model or the environment itself (upper bound), or take random actions (lower bound)",
    )  # fmt: skip
    parser.add_argument("--out", type=path, required=True, metavar="DIR", help="folder to write to")


def run_plan(parsed: argparse.Namespace) -> int:
    """Plan episodes and write them."""
    from jvgen.config import ConfigError, override, validate_tree
    from jvgen.control.environments import open_environment
    from jvgen.control.planning import vp2_cem, vp2_mppi
    from jvgen.runs.planning import cost_for, plan_episodes, read_goal, write_outcome
    from jvgen.runs.world_data import check_trained_on
    from jvgen.runs.world_models import load_world_model

    if (parsed.way == "model") != (parsed.model is not None):
        raise ConfigError(f"--with {parsed.way}: " + ("give MODEL" if parsed.model is None else "takes no MODEL") + ".")
    if (parsed.cost == "lpips") != (parsed.lpips is not None):
        raise ConfigError(f"--cost {parsed.cost}: --lpips FILE goes with --cost lpips, and only with it.")
    for name in ("episodes", "steps"):
        if getattr(parsed, name) < 1:
            raise ConfigError(f"--{name} {getattr(parsed, name)}: must be at least 1.")
    config = {"mppi": vp2_mppi, "cem": vp2_cem}[parsed.method](standard_deviation=(0.5,))
    config = override(config, parsed.assignments)
    validate_tree(config)
    _check_used(parsed, config.method)
    world = None
    if parsed.way == "model":
        world = load_world_model(
            parsed.model, frames=parsed.frames, greedy=parsed.greedy, ema=parsed.ema, step=parsed.step
        )
    size = None if world is None else world.tokenizer.resolution
    environment = open_environment(parsed.env, steps=parsed.steps, size=size)
    if parsed.way == "model" and not parsed.allow_other_data:
        try:
            check_trained_on(parsed.model, environment)
        except ConfigError as error:
            raise ConfigError(f"{error} (--allow-other-data plans all the same.)") from error
    goal = None if parsed.goal is None else read_goal(parsed.goal)
    if goal is None and parsed.cost != "reward" and parsed.way != "random" and not hasattr(environment, "goal_image"):
        raise ConfigError(f"--env {parsed.env}: has no goal image of its own: give --goal FILE, or --cost reward.")
    cost_of = cost_for(parsed.cost, parsed.lpips)
    outcome = plan_episodes(
        environment, world, cost_of, config, way=parsed.way, goal=goal, episodes=parsed.episodes, steps=parsed.steps,
        seed=parsed.seed, rows_at_once=parsed.rows_at_once,
    )  # fmt: skip
    for file in write_outcome(outcome, parsed.out):
        print(f"wrote {file}")
    print(", ".join(f"{name} {value:.3g}" for name, value in outcome.summary.items()))
    return 0


def _check_used(parsed: argparse.Namespace, method: str) -> None:
    """Raise `ConfigError` for flags and fields that would change nothing."""
    from jvgen.config import ConfigError

    for name in OF_MODEL if parsed.way != "model" else ():
        if getattr(parsed, name) not in (None, False, "best"):  # as they are without the flag
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag}: --with {parsed.way} uses no world model; leave {flag} out.")
    for assignment in parsed.assignments:
        field = assignment.partition("=")[0].strip()
        if OF_METHOD.get(field, method) != method:
            raise ConfigError(
                f"--set {assignment}: {method} does not use {field}; leave it out, or give --method {OF_METHOD[field]}."
            )
