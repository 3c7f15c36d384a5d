"""`jvgen demo views`: two cameras that film one generated scene, and a report.

An image VAE and a diffusion transformer are trained on scenes with known cameras: the transformer on single clips, from
which it learns captions, then, with the modules by which views attend to each other, on pairs. Then pairs are generated
from captions and camera paths, and measured against their cameras, beside the same network untrained. The image VAE is
taken from `jvgen demo` where that has run.
"""

import json
import signal
from pathlib import Path

from jvgen.demo.stages import Stages, check_configs
from jvgen.demo.views_report import write_report

SIZE, FRAMES = 32, 15
# Few colors and camera motions: captions of more take more steps to learn than a demo has.
COLORS = ("red", "yellow", "green", "blue")
SHAPES = ("ball", "cube")
KINDS = {"image": 0, "static": 0.7, "dynamic": 0.3}
SCENES = (
    f"frames={FRAMES}", f"height={SIZE}", f"width={SIZE}", *(f"kinds.{kind}={share}" for kind, share in KINDS.items()),
    "background=plain", "wander=0.0", f"colors={','.join(COLORS)}", f"shapes={','.join(SHAPES)}",
    "camera_motions=orbit left,orbit right",
)  # fmt: skip
TRAIN_SCENES, HELD_OUT_SCENES = 600, 64
VAE_STEPS, SINGLE_STEPS, STEPS = 200, 280, 110
# As many as a clip of a pair has.
SINGLE_FRAMES = 8
# Of the learning rate, for what single clips have trained already: at the whole rate captions are forgotten.
SINGLE_RATE = 0.2
GUIDANCE = 3.0
CAMERAS, VIEWS = "circle", 2
# What each stage shows, and about how many seconds it takes on two cores that do nothing else.
ABOUT = {
    "data": ("renders scenes with known cameras, which move around still bodies or watch moving ones", 15),
    "train_image_vae": ("trains an image VAE; taken from `make demo` where that has run", 120),
    "export_image_vae": ("writes the image VAE as a folder", 4),
    "latents": ("encodes all clips once", 25),
    "train_single": ("trains the transformer on single clips, 16 captions per step", 235),
    "train_views": ("continues it on pairs of views, 8 per step; stopped by SIGTERM, and resumed", 225),
    "evaluate_views": ("generates pairs for held-out cameras and measures how well they agree with them", 45),
    "sample": ("generates pairs of views from captions and cameras on a circle", 25),
    "sample_untrained": ("the same captions and cameras with untrained weights, to compare with", 15),
}


def demo(workdir: Path, configs: Path, other: Path = Path("runs/demo")) -> int:
    """Run all stages and write `workdir/report.html`.

    Args:
      workdir: folder for data, runs, views, the logs of the stages and the report.
      configs: folder with `demo_image_vae.py`, `demo_image_latents.py` and `demo_multiview.py`.
      other: folder of the main demo; its image VAE is used if it is there.

    Raises:
      ValueError: the config files do not exist.
      DemoFailed: a stage failed; its output is in `workdir/logs`.
    """
    names = ("image_vae", "image_latents", "multiview")
    vae_config, single_config, views_config = (configs / f"demo_{name}.py" for name in names)
    check_configs(vae_config, single_config, views_config)
    workdir.mkdir(parents=True, exist_ok=True)
    stages = Stages(workdir, ABOUT)
    scenes, latents = workdir / "scenes", workdir / "latents"
    vae_run, single, run = (workdir / name for name in ("image_vae", "single", "views"))
    vae = workdir / "export" / "image_vae" / "vae"

    sets = [word for field in SCENES for word in ("--set", field)]
    stages.run(
        "data", ["data", "build", "scenes", "--out", scenes, "--train", TRAIN_SCENES, "--validation", HELD_OUT_SCENES,
                 "--overwrite", *sets],
    )  # fmt: skip
    made = other / "export" / "image_vae" / "vae"
    if made.is_dir() and not vae.is_dir():
        print(f"[train_image_vae] skipped: the image VAE of {other} is used")
        vae = made
    else:
        stages.run(
            "train_image_vae",
            ["train", vae_config, "--workdir", vae_run, *_data(scenes), "--set", f"training.steps={VAE_STEPS}",
             "--set", "training.visualize_every=0"],
        )  # fmt: skip
        stages.run("export_image_vae", ["export", vae_run, "--to", vae.parent])
    stages.run(
        "latents",
        ["data", "build", "latents", scenes, "--vae", vae, "--size", f"{SIZE}x{SIZE}", "--keep-clips",
         "--out", latents, "--overwrite"],
    )  # fmt: skip
    statistics = json.loads((latents / "latent_statistics.json").read_text())
    common = [
        *_data(latents), "--set", f"task.vae_weights={vae}", "--set", f"task.latent_shift={statistics['mean']:.6g}",
        "--set", f"task.latent_scale={1 / statistics['deviation']:.6g}", "--set", "training.visualize_every=0",
        "--set", "training.evaluate_every=0",
    ]  # fmt: skip
    # All clips equally often; the weights of the config leave out most clips of still scenes.
    kinds = [word for kind in ("static", "dynamic") for word in ("--set", f"data.kind_weights.{kind}={KINDS[kind]}")]
    stages.run(
        "train_single",
        ["train", single_config, "--workdir", single, *common, *kinds, "--set", f"training.steps={SINGLE_STEPS}",
         "--set", f"data.buckets.0.frames={SINGLE_FRAMES}", "--set", f"task.denoiser.sample_frames={SINGLE_FRAMES}"],
    )  # fmt: skip
    train = [
        "train", views_config, "--workdir", run, *common, "--set", f"init_from.run={single}",
        "--set", "init_from.allow_partial=true", "--set", f"optimizer.multipliers.denoiser={SINGLE_RATE}",
        "--set", f"optimizer.multipliers.text_encoder={SINGLE_RATE}", "--set", f"task.guidance.scale={GUIDANCE}",
        "--set", f"training.steps={STEPS}", "--set", "checkpoint.every=50",
    ]  # fmt: skip
    stages.interrupt("train_views", train, run, signal.SIGTERM)
    prompts = workdir / "prompts.txt"
    prompts.write_text("".join(f"{prompt}\n" for prompt in demo_prompts()))
    sample = ["sample", run, "--prompts", prompts, "--cameras", CAMERAS, "--views", VIEWS, "--seed", 1]
    stages.side_by_side({
        "sample": [*sample, "--out", workdir / "samples"],
        "evaluate_views": [
            "evaluate", run, "--batches", 1, "--samples", 8, "--out", workdir / "views.json",
            "--report", workdir / "evaluation.html",
        ],
        "sample_untrained": [*sample, "--untrained", "--out", workdir / "samples_untrained"],
    })  # fmt: skip
    print(f"report: {write_report(workdir, stages.records, demo_prompts(), COLORS)}")
    return 0


def demo_prompts() -> list[str]:
    """One caption of a still scene per color and shape, worded like the training captions."""
    from jvgen.data.scenes.labels import Labels, captions_of

    labels = [Labels(color=color, shape=shape, camera="orbit left") for color in COLORS for shape in SHAPES]
    return [captions_of("static", one)[0] for one in labels]


def _data(folder: Path) -> list[object]:
    return ["--set", f"data.sources.0.path={folder}", "--set", f"data.evaluation_sources.0.path={folder}"]
