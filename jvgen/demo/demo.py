"""`jvgen demo`: the whole pipeline at a small scale, as the commands that a user would type, and a report.

An image VAE is trained and inflated to a causal video VAE that shares its latent space; a video DiT is trained on the
video VAE's latents, one per four frames, and its samples are decoded by either VAE. Every stage is a `jvgen` command in
a process of its own. The training of the image VAE is interrupted once by SIGKILL, that of the DiT by SIGTERM, and both
resume. Stages that are complete are skipped.
"""

import importlib.util
import json
import signal
from pathlib import Path

from jvgen.demo.report import write_report
from jvgen.demo.stages import Stages, check_configs

# Five latent frames of the video VAE: one for the first frame, then one per four frames.
FRAMES, SIZE = 17, 32
SCENES = (
    f"frames={FRAMES}", f"height={SIZE}", f"width={SIZE}", "background=plain", "wander=0.0", "shapes=ball,cube",
    "colors=red,yellow,green,blue,purple,cyan", "kinds.dynamic=0.75", "kinds.static=0.15", "kinds.image=0.1",
)  # fmt: skip
TRAIN_SCENES, HELD_OUT_SCENES = 420, 64
CLIPS_PER_PROMPT = 2
# What each stage shows, and about how many seconds it takes on two cores that do nothing else.
ABOUT = {
    "data": ("renders captioned scenes and writes them as a TFDS data set", 10),
    "data_show": ("writes some of its clips as pictures, with their captions", 2),
    "train_image_vae": ("trains an image VAE; killed after its first checkpoint, then resumed from it", 175),
    "evaluate_image_vae": ("measures reconstructions of held-out frames", 13),
    "export_image_vae": ("writes the image VAE as a folder that diffusers loads", 6),
    "inflate": ("makes a video VAE of the image VAE's weights, which shares its latents", 9),
    "train_video_vae": ("trains the video VAE on clips, against the frozen image decoder", 75),
    "export_video_vae": ("writes the video VAE as a folder", 7),
    "evaluate_video_vae": ("measures both VAEs' decoders on held-out clips, also each on the other's latents", 50),
    "latents": ("encodes all clips once, for the diffusion model", 33),
    "train_text_to_video": ("trains the video DiT on the latents; stopped by SIGTERM, saved, and resumed", 175),
    "evaluate_text_to_video": ("measures its loss on held-out clips by noise level", 16),
    "sample": ("samples clips from captions and decodes them with the video VAE", 26),
    "sample_swapped": ("the same latents, decoded by the image VAE frame by frame", 16),
    "sample_untrained": ("the same captions with untrained weights, to compare with", 12),
    "export_text_to_video": ("writes the DiT as a folder of weights", 8),
    "verify_image_vae": ("loads the exported VAE with diffusers' own class and compares the outputs", 9),
    "verify_denoiser": ("loads the exported DiT with diffusers' own class and compares the outputs", 8),
}


def demo(workdir: Path, configs: Path) -> int:
    """Run all stages and write `workdir/report.html`.

    Args:
      workdir: folder for data sets, runs, exports, samples, the logs of the stages and the report.
      configs: folder with `demo_image_vae.py`, `demo_cv_vae.py` and `demo_text_to_video.py`.

    Raises:
      ValueError: the config files do not exist.
      DemoFailed: a stage failed; its output is in `workdir/logs`.
    """
    check_configs(*(configs / f"demo_{name}.py" for name in ("image_vae", "cv_vae", "text_to_video")))
    workdir.mkdir(parents=True, exist_ok=True)
    stages = Stages(workdir, ABOUT)
    scenes, latents = workdir / "scenes", workdir / "latents"
    image_run, vae_run, run = workdir / "image_vae", workdir / "video_vae", workdir / "text_to_video"
    export = workdir / "export"
    image_vae, video_vae = export / "image_vae" / "vae", export / "video_vae" / "vae"
    size = f"{SIZE}x{SIZE}"

    sets = [word for field in SCENES for word in ("--set", field)]
    stages.run(
        "data", ["data", "build", "scenes", "--out", scenes, "--train", TRAIN_SCENES, "--validation", HELD_OUT_SCENES,
                 "--overwrite", *sets],
    )  # fmt: skip
    stages.run("data_show", ["data", "show", scenes, "--out", workdir / "pictures"])

    train = ["train", configs / "demo_image_vae.py", "--workdir", image_run, *_data(scenes)]
    stages.interrupt("train_image_vae", train, image_run, signal.SIGKILL)
    stages.run("export_image_vae", ["export", image_run, "--to", export / "image_vae"])

    inflated = [configs / "demo_cv_vae.py", *_data(scenes), "--set", f"task.image_vae_weights={image_vae}"]
    stages.side_by_side({
        "inflate": ["import", image_vae, "--inflate", "--config", *inflated, "--to", vae_run],
        "evaluate_image_vae": ["evaluate", image_run, "--batches", 8, "--out", workdir / "image_vae.json"],
    })  # fmt: skip
    stages.run("train_video_vae", ["train", *inflated, "--workdir", vae_run])
    stages.run("export_video_vae", ["export", vae_run, "--to", export / "video_vae"])
    stages.side_by_side({
        "latents": [
            "data", "build", "latents", scenes, "--vae", video_vae, "--size", size, "--out", latents, "--overwrite",
        ],
        "evaluate_video_vae": [
            "evaluate", "--vae", video_vae, "--image-vae", image_vae, "--data", scenes, "--frames", FRAMES,
            "--size", size, "--batch-size", 8, "--batches", 2, "--out", workdir / "video_vae_evaluation",
        ],
    })  # fmt: skip
    statistics = json.loads((latents / "latent_statistics.json").read_text())
    train = [
        "train", configs / "demo_text_to_video.py", "--workdir", run, *_data(latents),
        "--set", f"task.vae_weights={video_vae}",
        "--set", f"task.latent_shift={statistics['mean']:.6g}",
        "--set", f"task.latent_scale={1 / statistics['deviation']:.6g}",
    ]  # fmt: skip
    stages.interrupt("train_text_to_video", train, run, signal.SIGTERM)

    prompts = workdir / "prompts.txt"
    prompts.write_text("".join(f"{prompt}\n" for prompt in demo_prompts()))
    sample = ["sample", run, "--prompts", prompts, "--batch-size", 24, "--seed", 1]
    several = [*sample, "--clips-per-prompt", CLIPS_PER_PROMPT]
    stages.side_by_side({
        "sample": [*several, "--out", workdir / "samples"],
        "evaluate_text_to_video": ["evaluate", run, "--batches", 2, "--out", workdir / "text_to_video.json"],
        "export_text_to_video": ["export", run, "--to", export / "text_to_video"],
    })  # fmt: skip
    # They run what `sample` compiled. The same seed gives the same latents; the image VAE decodes each to one frame.
    stages.side_by_side({
        "sample_swapped": [*several, "--vae", image_vae, "--out", workdir / "samples_swapped"],
        "sample_untrained": [*sample, "--untrained", "--out", workdir / "samples_untrained"],
    })  # fmt: skip
    if _has_torch():
        stages.side_by_side({
            "verify_image_vae": ["verify", image_vae],
            "verify_denoiser": ["verify", export / "text_to_video" / "denoiser"],
        })  # fmt: skip
    else:
        print(
            "[verify] skipped: it compares the exports with PyTorch's classes; `pip install 'jvgen[torch]'` brings them"
        )

    report = write_report(workdir, stages.records)
    print(f"report: {report}")
    return 0


def demo_prompts() -> list[str]:
    """One caption per color and direction of the demo's scenes, worded like the training captions."""
    from jvgen.data.scenes.labels import Labels, captions_of

    colors = next(field for field in SCENES if field.startswith("colors=")).removeprefix("colors=").split(",")
    shapes = ("ball", "cube")
    prompts = []
    for row, color in enumerate(colors):
        for column, direction in enumerate(("left", "right", "toward", "away")):
            labels = Labels(color=color, shape=shapes[(row + column) % 2], direction=direction)
            prompts.append(captions_of("dynamic", labels)[0])
    return prompts


def _data(folder: Path) -> list[object]:
    return ["--set", f"data.sources.0.path={folder}", "--set", f"data.evaluation_sources.0.path={folder}"]


def _has_torch() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "diffusers"))
