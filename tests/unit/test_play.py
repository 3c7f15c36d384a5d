"""`jvgen play`: keys and files as actions, episodes in files and in the terminal, errors; adapted weights; FVD."""

import io
import json
import re
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from jvgen.config import ConfigError
from jvgen.control import play
from jvgen.data.store.records import Record
from jvgen.data.store.writer import Writer
from jvgen.data.stream.config import SourceConfig
from jvgen.data.video_files import decode_window, encode_video
from jvgen.evaluation.distribution import Moments, frechet_distance
from jvgen.interop.digest import DIGESTS_FILE
from jvgen.interop.formats import format_of
from jvgen.interop.from_torch import import_folder
from jvgen.interop.to_torch import export_network
from jvgen.models.ivideogpt.config import CompressiveTokenizerConfig, FrameTransformerConfig
from jvgen.reinforcement.config import ImaginationConfig
from jvgen.reinforcement.pretrained import read_pretrained
from jvgen.runs.inference import open_run
from jvgen.runs.world_models import load_world_model, read_context, trained_stride, training_data

TOKENIZER = CompressiveTokenizerConfig(
    resolution=16, block_channels=(8, 16), layers_per_block=1, groups=4, latent_channels=4, code_width=3,
    context_codes=18, future_codes=12, attention_side=8, attention_groups=4,
)  # fmt: skip
# Sequences of up to four frames.
TRANSFORMER = FrameTransformerConfig(
    vocabulary=32, width=24, layers=1, heads=3, hidden=40, max_positions=140, action_width=2, reward=True
)

pytestmark = pytest.mark.usefixtures("quick_compilations")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Both networks as folders, as published ones are."""
    folder, rng = tmp_path_factory.mktemp("model"), np.random.default_rng(0)
    for name, config in (("tokenizer", TOKENIZER), ("transformer", TRANSFORMER)):
        leaves, structure = jax.tree.flatten(format_of(config).network(config).shapes)
        drawn = [(0.3 * rng.standard_normal(s.shape) + (s.ndim == 1)).astype(np.float32) for s in leaves]
        export_network(config, structure.unflatten(drawn), folder / name)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "episodes"
    video = np.linspace(0, 200, 9)[:, None, None, None] + np.zeros((9, 16, 24, 3))
    record = Record(
        id="one", kind="dynamic", clips=(encode_video(video.astype(np.uint8), 8.0, quality=0),), frames_per_second=8.0,
        frames=9, height=16, width=24,
    )  # fmt: skip
    with Writer(folder, description="toy", metadata={}) as writer:
        writer.add("train", record)
    return folder


def test_keys():
    keys = list("d?w dxd")
    actions = list(play.actions_from_keys(keys, 2, 0.5))
    assert [action.tolist() for action in actions] == [[0.5, 0], [0, 0.5], [0, 0], [0.5, 0]]
    # The third component has no key in a world with two.
    assert not list(play.actions_from_keys("qe", 2, 1.0))
    with pytest.raises(ValueError, match="at most 6; give --actions"):
        list(play.actions_from_keys("d", 7, 1.0))
    assert "a/d component 0, s/w component 1; space: no action" in play.help_text(2)


def test_keys_without_a_terminal(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("ad"))
    assert list(play.pressed_keys()) == ["a", "d"]


def test_action_files(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n0.5,1\n\n-1,2e-1\n")
    np.testing.assert_allclose(play.read_actions(tmp_path / "a.csv", 2), [[0.5, 1], [-1, 0.2]])
    np.save(tmp_path / "b.npy", np.ones((3, 2)))
    assert play.read_actions(tmp_path / "b.npy", 2).dtype == np.float32
    (tmp_path / "c.csv").write_text("1,2\n3,fast\n")
    (tmp_path / "d.txt").write_text("1,2\n")
    for name, words in (
        ("a.csv", "has shape \\(2, 2\\); expected one line of 3"),
        ("c.csv", "cannot be read as actions: .*fast"),
        ("d.txt", "expected .npy or .csv"),
        ("none.csv", "no such file"),
    ):
        with pytest.raises(ValueError, match=words):
            play.read_actions(tmp_path / name, 3 if name == "a.csv" else 2)


def test_terminal_image():
    frame = np.zeros((3, 4, 3), np.uint8)
    frame[0, 0] = (255, 0, 7)
    text = play.terminal_image(frame)
    assert text.count("\n") == 1 and text.count("\u2580") == 8 and "38;2;255;0;7;48;2;0;0;0m" in text
    assert play.terminal_image(np.zeros((128, 128, 3), np.uint8)).count("\u2580") == 64 * 32
    written = []
    view = play.TerminalView(written.append)
    view(frame, "first")
    view(frame, "second")
    # The second picture begins where the first did.
    assert not written[0].startswith("\x1b[3A") and written[1].startswith("\x1b[3A") and "second" in written[1]


def test_episode_from_an_action_file(model, data, tmp_path, jvgen):
    (tmp_path / "actions.csv").write_text("0.5,0\n" * 5)
    out = tmp_path / "new" / "episode.mp4"
    done = jvgen("play", model, "--data", data, "--start-frame", 4, "--stride", 2, "--actions",
                 tmp_path / "actions.csv", "--out", out, "--greedy")  # fmt: skip
    assert done.status == 0, done.err
    assert "5 frames, sum of rewards" in done.out and "step 5" in done.out and "\u2580" in done.out
    rewards = (tmp_path / "new" / "episode.rewards.csv").read_text().splitlines()
    assert rewards[0] == "step,reward" and len(rewards) == 6
    frames = decode_window(out.read_bytes(), list(range(7)))
    assert abs(frames[0].mean() - 100) < 4 and abs(frames[1].mean() - 150) < 4
    gif = tmp_path / "episode.gif"
    done = jvgen(
        "play", model, "--data", data, "--actions", tmp_path / "actions.csv", "--steps", 1, "--quiet", "--out", gif
    )
    assert done.status == 0 and "\u2580" not in done.out
    with Image.open(gif) as image:
        assert image.n_frames <= 3


def test_episode_from_the_keyboard(model, data, jvgen, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("dwx"))
    done = jvgen("play", model, "--data", data, "--quiet")
    assert done.status == 0 and "a/d component 0" in done.out and "2 frames" in done.out


def test_an_exported_run_is_a_whole_world_model(model, data, tmp_path, jvgen):
    """It is played, and reinforcement learning starts with it; another tokenizer of the same shapes is refused."""
    together, other = tmp_path / "together", tmp_path / "other"
    tokenizer = shutil.copytree(model / "tokenizer", tmp_path / "tokenizer")
    text = ADAPTED.format(transformer=TRANSFORMER, tokenizer=TOKENIZER, weights=tokenizer)
    (tmp_path / "same.py").write_text(text.replace("<Remat.NONE: 'none'>", "Remat.NONE"))
    run = tmp_path / "run"
    assert jvgen("import", model / "transformer", "--config", tmp_path / "same.py", "--to", run).status == 0
    assert jvgen("export", run, "--to", together).status == 0
    assert jvgen("export", run, "--network", "transformer", "--to", tmp_path / "alone").status == 0
    assert not (tmp_path / "alone" / "tokenizer").exists()
    (tmp_path / "actions.csv").write_text("0.5,0\n")
    rest = ["--data", data, "--actions", tmp_path / "actions.csv", "--quiet"]
    assert jvgen("play", together, *rest).status == 0
    imagination = ImaginationConfig(tokenizer=TOKENIZER, transformer=TRANSFORMER, pretrained=str(together))
    for name, parameters in read_pretrained(imagination).items():
        jax.tree.map(np.testing.assert_array_equal, parameters, import_folder(model / name)[1])

    shutil.copytree(together, other, ignore=shutil.ignore_patterns(DIGESTS_FILE))
    weights = next((other / "tokenizer").glob("*.safetensors"))
    tensors = load_file(weights)
    first = sorted(tensors)[0]
    save_file(tensors | {first: tensors[first] + 1}, weights)
    # Since the run was trained: another one there, then none.
    shutil.rmtree(tokenizer)
    shutil.copytree(other / "tokenizer", tokenizer)
    done = jvgen("export", run, "--to", tmp_path / "changed")
    assert done.status == 2 and "not the tokenizer that the run was trained with" in done.err
    shutil.rmtree(tokenizer)
    done = jvgen("export", run, "--to", tmp_path / "without")
    assert done.status == 0 and "no tokenizer was written beside the transformer" in done.out
    done = jvgen("play", other, *rest)
    assert done.status == 2 and "not the one that its transformer/ was trained with" in done.err
    with pytest.raises(ConfigError, match="not the one that its transformer/ was trained with"):
        read_pretrained(imagination.replace(pretrained=str(other)), check_only=True)


def test_bad_input(model, data, tmp_path, jvgen):
    (tmp_path / "actions.csv").write_text("0.5,0\n")
    common = ["--data", data, "--actions", tmp_path / "actions.csv", "--quiet"]
    for words, message in (
        ([tmp_path, *common], "neither a run directory nor"),
        ([model, *common, "--record", 3], "--record 3: .* has recordings 0 to 0"),
        ([model, *common, "--start-frame", 8], "reaches frame 9; the recording has 9"),
        ([model, *common, "--stride", 0], "--stride: .0.: must be at least 1"),
        ([model, *common, "--out", tmp_path / "x.png"], "written as .mp4 or .gif"),
        ([model, *common, "--frames", 60], "more than transformer.max_positions = 140"),
    ):
        done = jvgen("play", *words)
        assert done.status == 2, words
        assert re.search(message, done.err), done.err


def test_the_goal_of_a_played_episode_is_the_last_recorded_frame(data):
    world = SimpleNamespace(context_frames=2, tokenizer=TOKENIZER, world=SimpleNamespace(goal=True))
    seen = [read_context(world, str(data), start=start, stride=2).mean(axis=(1, 2, 3)) for start in (0, 4, 8)]
    np.testing.assert_allclose(seen, [[200, 0], [200, 100], [200, 200]], atol=4)
    with pytest.raises(ValueError, match="reaches frame 9; the recording has 9"):
        read_context(world, str(data), start=9)


def test_a_run_is_played_as_its_config_says(model, tmp_path, jvgen):
    """Greedily, and with a goal, which its export keeps."""
    tokenizer = shutil.copytree(model / "tokenizer", tmp_path / "tokenizer")
    text = ADAPTED.format(transformer=TRANSFORMER, tokenizer=TOKENIZER, weights=tokenizer)
    text = text.replace("<Remat.NONE: 'none'>", "Remat.NONE").replace("frames=4", "frames=3")
    text = text.replace("tokenizer_weights=", "goal=True, sampling=SamplingConfig(greedy=True), tokenizer_weights=")
    text = f"from jvgen.models.ivideogpt.sampling import SamplingConfig\n{text}"
    (tmp_path / "goal.py").write_text(text)
    run, exported = tmp_path / "run", tmp_path / "exported"
    done = jvgen("import", model / "transformer", "--config", tmp_path / "goal.py", "--to", run)
    assert done.status == 0, done.err
    assert jvgen("export", run, "--to", exported).status == 0
    for folder, greedy in ((run, True), (exported, False), (model, False)):
        world = load_world_model(folder, frames=4).world
        assert (world.sampling.greedy, world.goal) == (greedy, folder != model)
    assert load_world_model(exported, frames=4, greedy=True).world.sampling.greedy
    # Imagination gives it no goal.
    for folder in (run, exported):
        imagination = ImaginationConfig(tokenizer=TOKENIZER, transformer=TRANSFORMER, pretrained=str(folder))
        with pytest.raises(ConfigError, match=r"a goal image as first frame .*accept_other_data=true"):
            read_pretrained(imagination, check_only=True)
        read_pretrained(imagination.replace(accept_other_data=True), check_only=True)
    # Also where the tokenizer is gone, and another copy of it is put beside the transformer.
    alone = tmp_path / "alone"
    shutil.rmtree(tokenizer)
    done = jvgen("export", run, "--to", alone)
    assert done.status == 0 and "no tokenizer was written" in done.out + done.err
    assert not (alone / "tokenizer").exists()
    shutil.copytree(model / "tokenizer", alone / "tokenizer")
    assert load_world_model(alone, frames=4).world.goal


def test_a_run_is_played_at_the_stride_of_its_clips(model, data, tmp_path, jvgen):
    """And from frames that were brought to its size as its clips were; recordings are 24 wide, 16 high."""
    text = ADAPTED.format(transformer=TRANSFORMER, tokenizer=TOKENIZER, weights=model / "tokenizer")
    text = text.replace("<Remat.NONE: 'none'>", "Remat.NONE").replace("batch_size=1", "batch_size=1, strides=(2, 4)")
    (tmp_path / "strides.py").write_text(text.replace("buckets=(", 'resize="squash", buckets=('))
    run, out = tmp_path / "run", tmp_path / "episode.mp4"
    done = jvgen("import", model / "transformer", "--config", tmp_path / "strides.py", "--to", run)
    assert done.status == 0, done.err
    (tmp_path / "actions.csv").write_text("0.5,0\n")
    words = ["play", run, "--data", data, "--actions", tmp_path / "actions.csv", "--quiet", "--out", out]
    for more, second, said in (([], 50, True), (["--stride", 1], 25, False)):
        done = jvgen(*words, *more)
        assert done.status == 0, done.err
        assert ("one recorded frame in 2 (--stride); an action is the sum of 2 recorded ones" in done.out) == said
        frames = decode_window(out.read_bytes(), [0, 1])
        assert abs(frames[0].mean()) < 4 and abs(frames[1].mean() - second) < 4
    trained = training_data(run)
    assert trained.resize == "squash" and training_data(model) is None
    bucket = trained.buckets[0].replace(strides=(1,), frames_per_second=2.0)
    assert trained_stride(trained.replace(buckets=(bucket,)), str(data)) == 4
    sources = (SourceConfig(path="nowhere"), SourceConfig(path=str(data), frame_stride=3))
    assert trained_stride(trained.replace(sources=sources), str(data)) == 6


def test_a_world_without_actions_takes_no_file_of_them(model, data, tmp_path, jvgen):
    alone = TRANSFORMER.replace(action_width=0, reward=False)
    folder = shutil.copytree(model, tmp_path / "free")
    shutil.rmtree(folder / "transformer")
    shapes = format_of(alone).network(alone).shapes
    export_network(alone, jax.tree.map(lambda s: np.zeros(s.shape, np.float32), shapes), folder / "transformer")
    (tmp_path / "actions.csv").write_text("0.5,0\n")
    done = jvgen("play", folder, "--data", data, "--actions", tmp_path / "actions.csv", "--quiet")
    assert done.status == 2 and "actions.csv: this world model takes no actions; leave it out" in done.err


def test_frames_are_cropped_or_squashed(tmp_path):
    world = SimpleNamespace(context_frames=2, tokenizer=TOKENIZER, world=SimpleNamespace(goal=False))
    ramp = np.broadcast_to(np.linspace(0, 230, 24)[:, None], (2, 16, 24, 3)).astype(np.uint8)
    clip = encode_video(ramp, 8.0, quality=0)
    record = Record(id="a", kind="dynamic", clips=(clip,), frames_per_second=8.0, frames=2, height=16, width=24)
    with Writer(tmp_path / "ramp", description="toy", metadata={}) as writer:
        writer.add("train", record)
    seen = [read_context(world, str(tmp_path / "ramp"), resize=resize)[0, 0, :, 0] for resize in ("crop", "squash")]
    assert abs(int(seen[0][0]) - 40) < 6 and int(seen[1][0]) < 12


# Weights adapted to other heads, as in the finetuning recipes.

ADAPTED = """
from jvgen.data.stream.config import BucketConfig, DataConfig, SourceConfig
from jvgen.training.experiment import Experiment
from jvgen.models.ivideogpt.config import CompressiveTokenizerConfig, FrameTransformerConfig
from jvgen.tasks.world_model import WorldModelConfig
from jvgen.training.config import TrainingConfig
from jvgen.nn.stacked import Remat


def experiment():
    return Experiment(
        name="adapted",
        task=WorldModelConfig(transformer={transformer}, tokenizer={tokenizer}, tokenizer_weights="{weights}"),
        data=DataConfig(
            sources=(SourceConfig(path="nowhere"),),
            buckets=(BucketConfig(frames=4, height=16, width=16, batch_size=1),),
        ),
        training=TrainingConfig(steps=1),
    )
"""


def test_released_weights_initialize_a_run_with_other_actions(model, tmp_path, jvgen):
    wider = TRANSFORMER.replace(action_width=3, reward=False)
    text = ADAPTED.format(transformer=wider, tokenizer=TOKENIZER, weights=model / "tokenizer")
    (tmp_path / "adapted.py").write_text(text.replace("<Remat.NONE: 'none'>", "Remat.NONE"))
    words = ["import", model / "transformer", "--config", tmp_path / "adapted.py", "--to", tmp_path / "run"]
    refused = jvgen(*words)
    assert refused.status == 2 and "action_width" in refused.err
    done = jvgen(*words, "--allow-partial")
    assert done.status == 0, done.err
    found = open_run(tmp_path / "run").parameters["transformer"]
    assert found["action"]["kernel"].shape == (3, 24) and not np.asarray(found["action"]["kernel"]).any()
    assert "reward" not in found
    _, given = import_folder(model / "transformer")
    np.testing.assert_array_equal(found["embedding"]["table"], given["embedding"]["table"])
    jax.tree.map(np.testing.assert_array_equal, found["blocks"], given["blocks"])


def test_fvd_of_a_runs_predictions(model, scenes, tmp_path, jvgen, monkeypatch):
    """From a run to the metric; the features of the I3D are tested with its network."""
    alone = TRANSFORMER.replace(action_width=0, reward=False)
    text = ADAPTED.format(transformer=alone, tokenizer=TOKENIZER, weights=model / "tokenizer")
    (tmp_path / "alone.py").write_text(text.replace("<Remat.NONE: 'none'>", "Remat.NONE"))
    words = [
        "import",
        model / "transformer",
        "--allow-partial",
        "--config",
        tmp_path / "alone.py",
        "--to",
        tmp_path / "run",
    ]
    assert jvgen(*words).status == 0
    seen = []

    def features(weights):
        def brightness(clips):
            jax.debug.callback(lambda found: seen.append(np.asarray(found)), clips)
            return clips.mean(axis=(2, 3, 4))

        assert str(weights) == "i3d.safetensors"
        return brightness

    monkeypatch.setattr("jvgen.evaluation.i3d.features", features)
    words = ["evaluate", tmp_path / "run", "--data", scenes, "--batches", 3, "--out", tmp_path / "found.json"]
    done = jvgen(*words, "--i3d", "i3d.safetensors")
    assert done.status == 0, done.err
    found = json.loads((tmp_path / "found.json").read_text())["metrics"]
    assert (found["fvd_recorded_clips"], found["fvd_made_clips"]) == (3, 3) and "psnr" in found
    # Batches of one: recorded, made, recorded, ... whole clips, whose first frames are made of tokens too.
    recorded, made = np.concatenate(seen[::2]), np.concatenate(seen[1::2])
    assert recorded.shape == made.shape == (3, 4, 16, 16, 3)
    levels = 255 * recorded
    np.testing.assert_allclose(levels, levels.round(), atol=1e-3)
    assert made.min() >= 0 and made.max() <= 1 and np.abs(255 * made - (255 * made).round()).max() > 0.1
    sides = [Moments.of(clips.mean(axis=(2, 3, 4))) for clips in (recorded, made)]
    assert found["fvd"] == pytest.approx(frechet_distance(*sides), rel=1e-3)
