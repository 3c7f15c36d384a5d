"""The demo's stages: run once, interrupted and resumed, reported when they fail; its commands fit together."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jvgen import config
from jvgen.cli.main import build_parser
from jvgen.data.scenes.labels import COLORS, labels_of
from jvgen.data.video_files import encode_video
from jvgen.demo import demo, views, views_report, world, world_report
from jvgen.demo import report as demo_report
from jvgen.demo.stages import DemoFailed, Stages, command_line, quick_to_compile, seconds_by_the_clock
from jvgen.interop.to_torch import export_network
from jvgen.models.cv_vae.config import CVVAEConfig
from jvgen.models.cv_vae.inflate import inflate
from jvgen.models.cv_vae.model import CVVAE
from jvgen.nn.network import Network
from tests.tiny_exports import VAE, drawn

CONFIGS = Path(__file__).parents[2] / "configs"

# Stands in for a training run: saves and waits for a signal, unless it finds what it saved.
TRAIN = """
import pathlib, signal, sys, time
saved = pathlib.Path(sys.argv[1]) / "checkpoints" / "1"
if saved.is_dir():
    print("restored step 1"); sys.exit(0)
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(75))
saved.mkdir(parents=True)
time.sleep(60)
"""


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """`Stages` whose commands are Python programs: the words are the program and its arguments."""

    def start(self, name, words):
        with (self._logs / f"{name}.log").open("w") as log:
            program, *arguments = (str(word) for word in words)
            return subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=log, stderr=subprocess.STDOUT)

    monkeypatch.setattr(Stages, "_start", start)
    return Stages(tmp_path)


def append(path) -> list[object]:
    return ["import sys; open(sys.argv[1], 'a').write('x')", path]


def test_programs_for_cpus_are_compiled_quickly_unless_flags_say_how():
    level = "--xla_backend_optimization_level"
    assert quick_to_compile({"JAX_PLATFORMS": "cpu"}) == {"XLA_FLAGS": f"{level}=1"}
    assert quick_to_compile({"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--a=b"}) == {"XLA_FLAGS": f"--a=b {level}=1"}
    assert quick_to_compile({"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{level}=3"}) == {}
    assert quick_to_compile({"JAX_PLATFORMS": "cuda"}) == quick_to_compile({}) == {}


def test_a_complete_stage_is_skipped(stages, tmp_path, capsys):
    stages.run("data", append(tmp_path / "ran"))
    stages.run("data", append(tmp_path / "ran"))
    Stages(tmp_path).run("data", append(tmp_path / "ran"))
    assert (tmp_path / "ran").read_text() == "x"
    assert capsys.readouterr().out.count("[data] skipped: complete") == 2
    (noted,) = json.loads((tmp_path / "stages.json").read_text())
    assert (noted["name"], noted["status"]) == ("data", 0) and noted["command"].startswith("jvgen ")
    assert noted["seconds"] > 0


MEETS = """
import pathlib, sys, time
own, other = (pathlib.Path(name) for name in sys.argv[1:3])
own.touch()
for _ in range(600):
    if other.exists(): sys.exit(int(sys.argv[3]))
    time.sleep(0.05)
sys.exit(4)
"""


def test_stages_side_by_side_run_at_once_and_count_once(stages, tmp_path):
    left, right = tmp_path / "left", tmp_path / "right"
    stages.side_by_side({"one": [MEETS, left, right, 0], "other": [MEETS, right, left, 0]})
    assert [record["status"] for record in stages.records] == [0, 0]
    seconds = [record["seconds"] for record in stages.records]
    assert max(seconds) - 0.01 <= seconds_by_the_clock(stages.records) < sum(seconds)
    assert all(0 < record["processor_seconds"] < record["seconds"] + 0.1 for record in stages.records)
    again = Stages(tmp_path)
    again.side_by_side({"one": [MEETS, left, right, 0], "other": [MEETS, right, left, 0]})
    assert len(again.records) == 2


def test_the_first_failure_of_stages_side_by_side_is_raised(stages, tmp_path):
    left, right = tmp_path / "left", tmp_path / "right"
    with pytest.raises(DemoFailed, match="stage one exited with status 3"):
        stages.side_by_side({"one": [MEETS, left, right, 3], "other": [MEETS, right, left, 0]})
    assert {record["name"]: record["status"] for record in stages.records} == {"one": 3, "other": 0}


def test_nothing_starts_after_a_failure_beside_it(stages, tmp_path):
    """The other stage goes on until the failure is recorded; then the third would have its turn."""
    waits = "import pathlib, sys, time\nwhile not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.05)\ntime.sleep(0.5)"
    with pytest.raises(DemoFailed, match="stage one exited with status 3"):
        stages.side_by_side({
            "one": ["import sys; sys.exit(3)"], "other": [waits, tmp_path / "stages.json"],
            "third": append(tmp_path / "ran"), "fourth": append(tmp_path / "ran"),
        })  # fmt: skip
    assert {record["name"]: record["status"] for record in stages.records} == {"one": 3, "other": 0}
    assert not (tmp_path / "ran").exists()


def test_time_by_the_clock():
    parts = [{"began": began, "seconds": seconds} for began, seconds in ((0, 10), (5, 3), (8, 6), (100, 1))]
    assert seconds_by_the_clock(parts) == 15
    assert seconds_by_the_clock([{"seconds": 2.0}, {"seconds": 3.0}]) == 5


def test_what_another_command_made_is_not_reported_as_this_demos(stages, tmp_path):
    """As the data of an earlier version, or latents of a VAE elsewhere."""
    stages.run("data", append(tmp_path / "ran"))
    with pytest.raises(DemoFailed, match="(?s)stage data: .* another command made:.*/ran.*/other.*--workdir"):
        Stages(tmp_path).run("data", append(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_a_failed_stage_prints_its_output_and_runs_again(stages, tmp_path):
    words = ["import sys; print('no space left'); sys.exit(3)"]
    with pytest.raises(DemoFailed, match="stage export exited with status 3:\n.*no space left"):
        stages.run("export", words)
    with pytest.raises(DemoFailed):
        Stages(tmp_path).run("export", words)
    assert [record["status"] for record in json.loads((tmp_path / "stages.json").read_text())] == [3, 3]


def test_a_killed_stage_restarts_with_an_empty_folder(stages, tmp_path):
    """Exports refuse folders that are not empty; folders that no stage of this demo wrote are not removed."""
    program = "import pathlib, sys; folder = pathlib.Path(sys.argv[2]); folder.mkdir(); (folder / 'whole').touch()"
    for name in ("half", "foreign"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").touch()
    (tmp_path / "logs" / "export.log").write_text("killed")
    stages.run("export", [program, "--to", tmp_path / "half"])
    assert [path.name for path in (tmp_path / "half").iterdir()] == ["whole"]
    with pytest.raises(DemoFailed, match="FileExistsError"):
        stages.run("other", [program, "--to", tmp_path / "foreign"])
    assert (tmp_path / "foreign" / "part").exists()


@pytest.mark.parametrize(("by", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, 75)])
def test_training_is_interrupted_once_and_resumes(stages, tmp_path, by, status):
    words = [TRAIN, tmp_path / "run"]
    stages.interrupt("train", words, tmp_path / "run", by)
    stages.interrupt("train", words, tmp_path / "run", by)
    first, second = stages.records
    assert (first["name"], first["status"], first["interrupted_by"]) == ("train_interrupted", status, by.name)
    assert (second["name"], second["status"]) == ("train", 0)
    assert first["command"] == second["command"]
    assert "restored step 1" in (tmp_path / "logs" / "train.log").read_text()


def test_clips_of_every_direction_and_color_are_shown():
    picked = [labels_of(caption) for caption in demo_report.every_second(2 * demo.demo_prompts())]
    assert len(picked) == len(demo.demo_prompts()) / 2
    assert {one.direction for one in picked} == set(demo_report.DIRECTIONS)
    assert {one.color for one in picked} == {labels_of(caption).color for caption in demo.demo_prompts()}


def test_training_that_fails_before_its_interruption_is_reported(stages, tmp_path):
    with pytest.raises(DemoFailed, match="train_interrupted exited with status 2, not 75:\n.*no data set"):
        words = ["import sys; print('no data set'); sys.exit(2)"]
        stages.interrupt("train", words, tmp_path / "run", signal.SIGTERM)
    (record,) = stages.records
    assert record["name"] == "train_interrupted" and "interrupted_by" not in record


def test_a_run_that_ends_before_its_signal_is_not_called_interrupted(stages, tmp_path):
    """With a checkpoint of an attempt that was killed with the demo: nothing new is saved, and no signal sent."""
    (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)
    stages.interrupt("train", [TRAIN, tmp_path / "run"], tmp_path / "run", signal.SIGTERM)
    assert [(r["name"], r["status"], "interrupted_by" in r) for r in stages.records] == [
        ("train_interrupted", 0, False), ("train", 0, False)
    ]  # fmt: skip
    assert "0 runs were stopped" in demo_report.interruptions(stages.records)
    assert "FAILED: train ended before" in demo_report.interruptions(stages.records)


def test_command_line():
    words = ["sample", "runs/x", "--prompt", "a red ball", "--clips-per-prompt", 2]
    assert command_line(words) == "jvgen sample runs/x --prompt 'a red ball' --clips-per-prompt 2"


def test_prompts_name_every_color_and_direction_of_the_scenes():
    labels = [labels_of(prompt) for prompt in demo.demo_prompts()]
    fields = dict(field.split("=") for field in demo.SCENES)
    colors, shapes = fields["colors"].split(","), fields["shapes"].split(",")
    assert len({(label.color, label.direction) for label in labels}) == len(labels) == 4 * len(colors)
    assert {label.color for label in labels} == set(colors) and {label.shape for label in labels} == set(shapes)
    assert {label.direction for label in labels} == {"left", "right", "toward", "away"}
    assert not any(label.camera or label.driven for label in labels)


def test_missing_configs(tmp_path):
    for made, first in ((demo, "image_vae"), (world, "ivideogpt_tokenizer"), (views, "image_vae")):
        with pytest.raises(ValueError, match=f"demo_{first}.py: no such file.*--configs"):
            made.demo(tmp_path / "work", tmp_path)
    assert not (tmp_path / "work").exists()


def test_the_world_demo_needs_gymnasium_before_its_first_stage(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    monkeypatch.delitem(sys.modules, "jvgen.control.scene_environment", raising=False)
    with pytest.raises(ImportError, match=r"install jvgen\[control\]"):
        world.demo(tmp_path / "work", CONFIGS)
    assert not (tmp_path / "work").exists()


def test_a_stage_says_what_it_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Stages, "_start", lambda self, name, words: subprocess.Popen([sys.executable, "-c", ""]))
    Stages(tmp_path, {"data": ("renders scenes", 10)}).run("data", ["-"])
    assert "[data] renders scenes (all of it about 10 s on two idle cores)" in capsys.readouterr().out


def test_every_command_parses_and_configs_fit_the_scenes(tmp_path, monkeypatch):
    commands: dict[str, list[str]] = {}

    def note(self, name, words, *signal_and_run):
        commands[name] = [str(word) for word in words]
        if name == "latents":
            folder = tmp_path / "latents"
            folder.mkdir()
            (folder / "latent_statistics.json").write_text('{"mean": 0.5, "deviation": 4.0}')

    for method in ("run", "interrupt"):
        monkeypatch.setattr(Stages, method, note)
    monkeypatch.setattr(demo, "write_report", lambda workdir, records: workdir / "report.html")
    assert demo.demo(tmp_path, CONFIGS) == 0
    parsed = {name: build_parser().parse_args(words) for name, words in commands.items()}
    experiments = {}
    for name, words in parsed.items():
        if name.startswith("train_"):
            experiments[name] = config.override(config.load(words.config), words.assignments)
            config.validate_tree(experiments[name])
    task = experiments["train_text_to_video"].task
    (bucket,) = experiments["train_text_to_video"].data.buckets
    assert (bucket.frames, bucket.height, bucket.width) == (demo.FRAMES, demo.SIZE, demo.SIZE)
    assert task.latent_shape(demo.FRAMES, demo.SIZE, demo.SIZE) == (5, 8, 8) and task.latent_scale == 0.25
    # Each stage reads what an earlier one writes.
    assert Path(task.vae_weights) == parsed["evaluate_video_vae"].vae == Path(parsed["latents"].vae)
    assert parsed["sample_swapped"].vae == parsed["evaluate_video_vae"].image_vae == parsed["inflate"].weights
    assert task.vae == experiments["train_video_vae"].task.network
    assert parsed["inflate"].to == parsed["train_video_vae"].workdir == parsed["export_video_vae"].run
    assert parsed["sample_swapped"].seed == parsed["sample"].seed


@pytest.mark.parametrize("made", [world, views])
def test_commands_of_the_other_demos_parse(tmp_path, monkeypatch, made):
    """Every stage is explained, and what it trains is a valid experiment that reads what an earlier stage wrote."""
    commands: dict[str, list[str]] = {}

    def note(self, name, words, *signal_and_run):
        commands[name] = [str(word) for word in words]
        if name == "latents":
            (tmp_path / "latents").mkdir()
            (tmp_path / "latents" / "latent_statistics.json").write_text('{"mean": 0.5, "deviation": 4.0}')

    for method in ("run", "interrupt"):
        monkeypatch.setattr(Stages, method, note)
    monkeypatch.setattr(made, "write_report", lambda workdir, *rest: workdir / "report.html")
    assert made.demo(tmp_path, CONFIGS, *[tmp_path / "none"] * (made is views)) == 0
    assert set(commands) == set(made.ABOUT)
    parsed = {name: build_parser().parse_args(words) for name, words in commands.items()}
    experiments = {}
    for name, words in parsed.items():
        if name.startswith("train_"):
            experiments[name] = config.override(config.load(words.config), words.assignments)
            config.validate_tree(experiments[name])
    if made is views:
        task = experiments["train_views"].task
        assert Path(task.vae_weights) == Path(parsed["latents"].vae) == Path(parsed["export_image_vae"].to) / "vae"
        assert task.latent_scale == 0.25 and len(parsed["sample"].cameras) == 1
        single, pairs = experiments["train_single"], experiments["train_views"]
        assert Path(pairs.init_from.run) == parsed["train_single"].workdir
        assert single.task.vae_weights == task.vae_weights
        assert single.task.denoiser == task.denoiser.plain and single.data.sources == pairs.data.sources
        assert {labels_of(prompt).color for prompt in views.demo_prompts()} == set(views.COLORS)
    else:
        task = experiments["train_world"].task
        assert Path(task.tokenizer_weights) == Path(parsed["export_tokenizer"].to) / "tokenizer"
        assert task.tokenizer == experiments["train_tokenizer"].task.network
        assert [parsed[f"plan_{way}"].way for way in world.WAYS] == list(world.WAYS)


def moving_square(
    right: int, color: tuple[int, int, int] = (230, 30, 30), frames: int = 5, down: int = 0
) -> np.ndarray:
    """A square that moves over gray, uint8 `F 32 32 3`."""
    clip = np.full((frames, 32, 32, 3), 120, np.uint8)
    for frame in range(frames):
        x, y = 12 + right * frame, 12 + down * frame
        clip[frame, y : y + 6, x : x + 6] = color
    return clip


def test_pushes_are_followed_or_not():
    right, left, still = (world_report.displacement(moving_square(step)) for step in (2, -2, 0))
    assert right == (8.0, 0.0) and left == (-8.0, 0.0)
    assert world_report.followed((1.0, 0.0), right, left) and not world_report.followed((1.0, 0.0), left, right)
    assert not world_report.followed((1.0, 0.0), still, still) and not world_report.followed((0.0, 1.0), right, left)
    assert world_report.followed((0.0, 1.0), (0.0, -3.0), (0.0, 3.0))  # away from the camera is up
    assert not world_report.followed((1.0, 0.0), (-1.0, 0.0), (-9.0, 0.0))  # parted, but both went left
    gone = world_report.displacement(np.full((3, 32, 32, 3), 90, np.uint8))
    assert gone == (None, None) and not world_report.followed((1.0, 0.0), right, gone)


@pytest.mark.parametrize("works", [True, False])
def test_the_report_of_a_world_model_shows_failures(tmp_path, works):
    for way in world.WAYS:
        folder = tmp_path / "plans" / way
        folder.mkdir(parents=True)
        (folder / "episode_000.mp4").write_bytes(encode_video(moving_square(1), 8.0))
        numbers = {"success": works, "rewards": [0.5, 0.25], "actions": [[0.0, 1.0]] * 2}
        (folder / "episode_000.json").write_text(json.dumps(numbers))
        summary = {"episodes": 1, "success": float(works), "return": 0.75, "plans_per_second": 0.5}
        (folder / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "played").mkdir()
    for name, push in world.PUSHES.items():
        clip = moving_square(2 * int(push[0]), down=-2 * int(push[1])) if works else moving_square(1)
        (tmp_path / "played" / f"{name}.mp4").write_bytes(encode_video(clip, 10.0))
    for run in ("tokenizer", "world"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    metrics = {"psnr": 20.0 if works else 10.0, "ssim": 0.8, "psnr_copying": 15.0, "ssim_copying": 0.7}
    (tmp_path / "world.json").write_text(json.dumps({"metrics": metrics}))
    parts = [{"name": "data", "seconds": 1.0, "processor_seconds": 2.0, "command": "jvgen data"}]
    page = world_report.write_report(tmp_path, parts, world.PUSHES, world.WAYS).read_text()
    assert page.count("FAILED") == (0 if works else 3 + 1 + 1)
    assert ("reached, sum of rewards 0.75" in page) and ("1 of 1 episodes" in page) == works
    assert json.loads((tmp_path / "measurements.json").read_text())["plans"]["model"]["success"] == works


def test_the_report_of_two_cameras_shows_failures(tmp_path):
    prompts, palette = views.demo_prompts()[::2][:2], {name: COLORS[name] for name in views.COLORS}
    pairs = {"samples": [("red", "red"), ("yellow", "green")], "samples_untrained": [("blue", "green")] * 2}
    for folder, shown in pairs.items():
        (tmp_path / folder).mkdir()
        # In the order of the prompts, whatever the folders are called.
        index = "".join(json.dumps({"file": f"set_{9 - number}"}) + "\n" for number in range(len(shown)))
        (tmp_path / folder / "index.jsonl").write_text(index)
        for number, pair in enumerate(shown):
            place = tmp_path / folder / f"set_{9 - number}"
            place.mkdir()
            for view, name in enumerate(pair):
                color = tuple(int(255 * part) for part in palette[name]) if max(palette[name]) <= 1 else palette[name]
                clip = moving_square(1, color)
                (place / f"view_{view}.mp4").write_bytes(encode_video(clip, 8.0))
    for run in ("single", "views"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    (tmp_path / "views.json").write_text('{"metrics": {"loss": 1.5}}')
    parts = [{"name": "data", "seconds": 1.0, "command": "jvgen data"}]
    page = views_report.write_report(tmp_path, parts, prompts, views.COLORS).read_text()
    found = json.loads((tmp_path / "measurements.json").read_text())["scores"]["trained"]
    assert found["named_color"] == 0.75 and found["same_color"] == 0.5
    assert "FAILED: seen are yellow and green" in page and page.count("(FAILED") == 1


def test_frames_of_latents_are_held_and_the_decoders_compared():
    still = np.array([10, 20, 40], np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    moving = np.array([11, 13, 15, 17, 19, 20, 21, 22, 39], np.uint8)[:, None, None, None] * np.ones_like(still[:1])
    assert demo_report._repeated(still, 4)[:, 0, 0, 0].tolist() == [10, 20, 20, 20, 20, 40, 40, 40, 40]
    found = demo_report._swap([moving], [still])
    assert found["psnr"] == pytest.approx(10 * np.log10(255**2))
    assert found["video_decoder"] == [1.5, 1.5, 1.5, 9.5] and found["image_decoder"] == 15.0


def test_clips_of_the_report_are_coded(tmp_path, quick_compilations) -> None:
    """By the video VAE and across both, as the report shows them."""
    image = VAE
    video = CVVAEConfig.causal(image)
    shapes = Network.of(lambda rngs: CVVAE(video, rngs=rngs)).shapes
    weights = drawn(image)
    export_network(image, weights, tmp_path / "image_vae" / "vae")
    inflated = jax.tree.map(np.asarray, inflate(image, weights, video, shapes))
    export_network(video, inflated, tmp_path / "video_vae" / "vae")
    clip = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    coded = demo_report._coded(tmp_path, [clip, clip[::-1]])
    assert set(coded) == {"reconstruction", "image_decoder", "image_latents"}
    assert all(one.shape == clip.shape and one.dtype == np.uint8 for clips in coded.values() for one in clips)
