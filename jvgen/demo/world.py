"""`jvgen demo world`: a world model of pushed cubes is trained, played and planned in, and a report.

A tokenizer and a transformer that predicts frames from actions are trained on scenes in which actions push one cube.
Then the model is played with pushes in four directions, and plans in it drive the cube to goal images, beside plans in
the simulator itself and random actions. The transformer's training is stopped once by SIGTERM and resumes.
"""

import importlib
import signal
from pathlib import Path

from jvgen.demo.stages import Stages, check_configs
from jvgen.demo.world_report import write_report

SIZE, FRAMES = 32, 16
SCENES = (
    f"frames={FRAMES}", f"height={SIZE}", f"width={SIZE}", "driven=1.0", "kinds.image=0", "kinds.static=0",
    "wander=0", "background=plain", "colors=red", "shapes=cube",
)  # fmt: skip
TRAIN_SCENES, HELD_OUT_SCENES = 400, 32
TOKENIZER_STEPS, WORLD_STEPS = 300, 220
# One action a row: a cube is pushed along the two axes of the ground.
PUSHES = {"push_right": (1.0, 0.0), "push_left": (-1.0, 0.0), "push_up": (0.0, 1.0), "push_down": (0.0, -1.0)}
# Few: a cube that is pushed on leaves the picture.
PUSH_STEPS = 4
EPISODES, ACTIONS = 2, 15
SEARCH = ("samples=32", "iterations=2", "horizon=6", "correlation=0.3", "elites=0.1", "standard_deviation=1.0")
WAYS = ("model", "simulator", "random")
# What each stage shows, and about how many seconds it takes on two cores that do nothing else.
ABOUT = {
    "data": ("renders clips of one cube that actions push over a plain ground", 10),
    "train_tokenizer": ("trains the tokenizer: frames to 64 ids, later frames to 16", 170),
    "export_tokenizer": ("writes the tokenizer as a folder of weights", 5),
    "train_world": ("trains the transformer that predicts ids from actions; stopped by SIGTERM, and resumed", 135),
    "evaluate_world": ("measures predictions of held-out clips, beside repeating the last frame", 20),
    "export_world": ("writes both networks as folders that `jvgen play` and `jvgen plan` take", 5),
    **{name: ("plays the model from one recorded start: the same push four times", 10) for name in PUSHES},
    "plan_model": ("plans in the model to drive the cube to goal images", 120),
    "plan_simulator": ("plans in the simulator itself: what a perfect model would reach", 30),
    "plan_random": ("takes random actions: what no model reaches", 5),
}


def demo(workdir: Path, configs: Path) -> int:
    """Run all stages and write `workdir/report.html`.

    Args:
      workdir: folder for data, runs, exports, episodes, the logs of the stages and the report.
      configs: folder with `demo_ivideogpt_tokenizer.py` and `demo_ivideogpt_transformer.py`.

    Raises:
      ValueError: the config files do not exist.
      ImportError: gymnasium is not installed, which the plans at its end need.
      DemoFailed: a stage failed; its output is in `workdir/logs`.
    """
    tokenizer_config, world_config = (configs / f"demo_ivideogpt_{name}.py" for name in ("tokenizer", "transformer"))
    check_configs(tokenizer_config, world_config)
    importlib.import_module("jvgen.control.scene_environment")
    workdir.mkdir(parents=True, exist_ok=True)
    stages = Stages(workdir, ABOUT)
    scenes, export = workdir / "scenes", workdir / "export"
    tokenizer_run, world_run, world = workdir / "tokenizer", workdir / "world", export / "world"
    sources = [word for kind in ("sources", "evaluation_sources") for word in ("--set", f"data.{kind}.0.path={scenes}")]

    sets = [word for field in SCENES for word in ("--set", field)]
    stages.run(
        "data", ["data", "build", "scenes", "--out", scenes, "--train", TRAIN_SCENES, "--validation", HELD_OUT_SCENES,
                 "--overwrite", *sets],
    )  # fmt: skip
    stages.run(
        "train_tokenizer",
        ["train", tokenizer_config, "--workdir", tokenizer_run, *sources, "--set", "data.buckets.0.batch_size=4",
         "--set", f"training.steps={TOKENIZER_STEPS}"],
    )  # fmt: skip
    stages.run("export_tokenizer", ["export", tokenizer_run, "--to", export / "tokenizer"])
    train = [
        "train", world_config, "--workdir", world_run, *sources, "--set", f"training.steps={WORLD_STEPS}",
        "--set", f"task.tokenizer_weights={export / 'tokenizer' / 'tokenizer'}", "--set", "checkpoint.every=70",
    ]  # fmt: skip
    stages.interrupt("train_world", train, world_run, signal.SIGTERM)
    pushes, plans = {}, {}
    for name, push in PUSHES.items():
        actions = workdir / f"{name}.csv"
        actions.write_text(f"{push[0]},{push[1]}\n" * PUSH_STEPS)
        pushes[name] = [
            "play", world_run, "--data", scenes, "--actions", actions, "--greedy", "--quiet",
            "--out", workdir / "played" / f"{name}.mp4",
        ]  # fmt: skip
    search = [word for field in SEARCH for word in ("--set", field)]
    for way in WAYS:
        model = [world_run, "--greedy"] if way == "model" else []
        plans[f"plan_{way}"] = [
            "plan", *model, "--with", way, "--env", scenes, "--method", "cem", *search, "--episodes", EPISODES,
            "--steps", ACTIONS, "--out", workdir / "plans" / way,
        ]  # fmt: skip
    stages.side_by_side({
        "evaluate_world": ["evaluate", world_run, "--batches", 4, "--out", workdir / "world.json"],
        "export_world": ["export", world_run, "--to", world],
        **pushes,
    })  # fmt: skip
    # One by one: the report has their speed.
    for name, words in plans.items():
        stages.run(name, words)
    print(f"report: {write_report(workdir, stages.records, PUSHES, WAYS)}")
    return 0
