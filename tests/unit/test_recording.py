"""Episodes recorded from an environment are what the environment does."""

import numpy as np
import pytest

from jvgen.cli.main import main
from jvgen.control.scene_environment import SceneEnvironment
from jvgen.data.builders.scenes import build_scenes
from jvgen.data.scenes.scenes import SceneConfig
from jvgen.data.store.sources import open_source
from jvgen.data.video_files import decode_window
from jvgen.runs.recording import RecordingConfig, record_episode

SMALL = SceneConfig(height=16, width=16, frames=6, kinds={"dynamic": 1.0}, driven=1.0, supersampling=1)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "scenes"
    build_scenes(folder, SMALL, train=2, validation=1, workers=1)
    return folder


@pytest.mark.parametrize("policy", ["expert", "random"])
def test_recorded_actions_lead_to_the_recorded_frames(scenes, tmp_path, policy) -> None:
    arguments = ["data", "build", "environment", str(scenes), "--train", "2", "--validation", "1", "--set", "steps=5"]
    assert main([*arguments, "--set", f"policy={policy}", "--set", "quality=0", "--out", str(tmp_path / "out")]) == 0
    source = open_source(tmp_path / "out", "train")
    assert len(source) == 2 and len(open_source(tmp_path / "out", "validation")) == 1
    record = source.read(1)
    assert record.actions.shape == (6, 2) and record.frames == 6 and not record.actions[-1].any()
    video = decode_window(record.clips[0], range(6)).astype(int)
    environment = SceneEnvironment.of_dataset(scenes, "train", steps=5)
    rng = np.random.default_rng((0, 1))
    frames, rewards = [environment.reset(seed=int(rng.integers(2**31)))[0]], []
    for action in record.actions[:-1]:
        frame, reward, *_ = environment.step(action)
        frames.append(frame)
        rewards.append(reward)
    assert np.abs(video - np.stack(frames)).mean() < 1.5
    np.testing.assert_allclose(record.rewards, [*rewards, 0.0], atol=1e-6)
    if policy == "expert":
        assert sum(rewards) > 0.5


def test_a_share_of_random_actions_among_those_of_the_expert(scenes) -> None:
    config = RecordingConfig(noise=0.0, random_share=0.5, steps=5, quality=0)
    environment, alike = SceneEnvironment.of_dataset(scenes, "train", steps=5), []
    for index in range(8):
        rng = np.random.default_rng((0, index))
        environment.reset(seed=int(rng.integers(2**31)))
        for action in record_episode(str(scenes), config, 0, index).actions[:-1]:
            alike.append(np.allclose(action, np.clip(environment.expert_action(), -1, 1), atol=1e-6))
            environment.step(action)
    assert 10 <= sum(alike) <= 30


def test_an_environment_without_an_expert(tmp_path, capsys) -> None:
    arguments = ["data", "build", "environment", "tests.unit.test_recording:plain", "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "no expert_action()" in capsys.readouterr().err and not (tmp_path / "out").exists()


def plain():
    environment = SceneEnvironment(SMALL)
    return type("Plain", (), {name: getattr(environment, name) for name in ("observation_space", "action_space")})()
