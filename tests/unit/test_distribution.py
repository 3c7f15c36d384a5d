"""I3D against a PyTorch module with the same weights, Fréchet distances in closed form, scores of predictions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvgen.evaluation import i3d
from jvgen.evaluation.distribution import Moments, VideoDistance, frechet_distance
from jvgen.evaluation.prediction import best_of, by_horizon, with_context

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.numpy")
pytestmark = pytest.mark.torch


def same_padding(x, kernel, stride):
    """TensorFlow's: enough for ceil(size / stride) places, the odd one at the end."""
    pad = []
    for size, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        total = max(k - (s if size % s == 0 else size % s), 0)
        pad += [total // 2, total - total // 2]
    return torch.nn.functional.pad(x, pad)


class Unit(torch.nn.Module):
    def __init__(self, into, out, size, stride=1):
        super().__init__()
        self.size, self.stride = (size,) * 3, (stride,) * 3
        self.conv3d = torch.nn.Conv3d(into, out, size, stride, bias=False)
        self.bn = torch.nn.BatchNorm3d(out, eps=0.001)

    def forward(self, x):
        return torch.relu(self.bn(self.conv3d(same_padding(x, self.size, self.stride))))


def pool(x, kernel, stride):
    # After a ReLU, zeros beside the clip are never larger than what is in it.
    return torch.nn.functional.max_pool3d(same_padding(x, kernel, stride), kernel, stride)


class Inception(torch.nn.Module):
    def __init__(self, into, widths):
        super().__init__()
        zero, one, two, three, four, five = widths
        self.b0, self.b1a, self.b1b = Unit(into, zero, 1), Unit(into, one, 1), Unit(one, two, 3)
        self.b2a, self.b2b, self.b3b = Unit(into, three, 1), Unit(three, four, 3), Unit(into, five, 1)

    def forward(self, x):
        pooled = pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], dim=1)


class I3D(torch.nn.Module):
    """Written from the paper's figure 3, with the names of the usual port."""

    WIDTHS = {
        "3b": (64, 96, 128, 16, 32, 32), "3c": (128, 128, 192, 32, 96, 64), "4b": (192, 96, 208, 16, 48, 64),
        "4c": (160, 112, 224, 24, 64, 64), "4d": (128, 128, 256, 24, 64, 64), "4e": (112, 144, 288, 32, 64, 64),
        "4f": (256, 160, 320, 32, 128, 128), "5b": (256, 160, 320, 32, 128, 128), "5c": (384, 192, 384, 48, 128, 128),
    }  # fmt: skip

    def __init__(self):
        super().__init__()
        self.Conv3d_1a_7x7 = Unit(3, 64, 7, 2)
        self.Conv3d_2b_1x1, self.Conv3d_2c_3x3 = Unit(64, 64, 1), Unit(64, 192, 3)
        width = 192
        for name, widths in self.WIDTHS.items():
            setattr(self, f"Mixed_{name}", Inception(width, widths))
            width = widths[0] + widths[2] + widths[4] + widths[5]
        self.logits = torch.nn.Module()
        self.logits.conv3d = torch.nn.Conv3d(width, 400, 1)

    def forward(self, x):
        x = pool(self.Conv3d_1a_7x7(x), (1, 3, 3), (1, 2, 2))
        x = pool(self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x)), (1, 3, 3), (1, 2, 2))
        x = pool(self.Mixed_3c(self.Mixed_3b(x)), (3, 3, 3), (2, 2, 2))
        for name in ("4b", "4c", "4d", "4e", "4f"):
            x = getattr(self, f"Mixed_{name}")(x)
        x = self.Mixed_5c(self.Mixed_5b(pool(x, (2, 2, 2), (2, 2, 2))))
        x = torch.nn.functional.avg_pool3d(x, (2, min(7, x.shape[3]), min(7, x.shape[4])), 1)
        return self.logits.conv3d(x).mean(dim=(2, 3, 4))


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    model = I3D().eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
            elif "bn" in name and tensor.ndim:
                tensor.normal_(0.1, 0.3).add_(1.0 if name.endswith("weight") else 0.0)
    return model


def other_names(state: dict) -> dict:
    """The same tensors as the other port names them."""
    branches = {"b0": "branch_0", "b1a": "branch_1.0", "b1b": "branch_1.1", "b2a": "branch_2.0", "b2b": "branch_2.1",
                "b3b": "branch_3.1"}  # fmt: skip
    renamed = {}
    for name, value in state.items():
        parts = [branches.get(part, part) for part in name.split(".")]
        name = ".".join(parts).replace("Mixed_", "mixed_").replace("Conv3d_", "conv3d_").replace(".bn.", ".batch3d.")
        renamed[name.replace("logits.", "conv3d_0c_1x1.")] = value
    return renamed


def test_i3d_equals_the_torch_module(original, tmp_path):
    state = {n: t.numpy() for n, t in original.state_dict().items() if not n.endswith("num_batches_tracked")}
    safetensors.save_file(state, tmp_path / "i3d.safetensors")
    safetensors.save_file(other_names(state), tmp_path / "other.safetensors")
    parameters = i3d.load_i3d(tmp_path / "i3d.safetensors")
    other = i3d.load_i3d(tmp_path / "other.safetensors")
    jax.tree.map(np.testing.assert_array_equal, parameters, other)
    # Odd sizes, so that every padding has an odd place.
    video = np.random.default_rng(0).uniform(-1, 1, (2, 11, 45, 38, 3)).astype(np.float32)
    with torch.no_grad():
        expected = original(torch.from_numpy(video.transpose(0, 4, 1, 2, 3).copy())).numpy()
    got = jax.jit(i3d.logits)(parameters, video)
    assert got.shape == (2, 400)
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())


def test_i3d_input_is_that_of_the_published_measurements():
    video = np.random.default_rng(0).uniform(0, 1, (1, 2, 30, 40, 3)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(video[0].transpose(0, 3, 1, 2).copy()), (224, 224), mode="bilinear", align_corners=False
    )
    np.testing.assert_allclose(
        i3d.prepare(jnp.asarray(video))[0], 2 * expected.numpy().transpose(0, 2, 3, 1) - 1, atol=1e-5
    )


def test_i3d_rejects_invalid_files_and_clips(tmp_path):
    with pytest.raises(ValueError, match="clips of 8 frames: I3D needs at least 9"):
        i3d.logits({}, jnp.zeros((1, 8, 32, 32, 3)))
    with pytest.raises(ValueError, match="do not exist"):
        i3d.load_i3d(tmp_path / "none.safetensors")
    safetensors.save_file(
        {"Conv3d_1a_7x7.conv3d.weight": np.zeros((64, 3, 7, 7, 6), np.float32)}, tmp_path / "x.safetensors"
    )
    with pytest.raises(ValueError, match="Conv3d_1a_7x7.kernel has shape .*missing Conv3d_1a_7x7.scale"):
        i3d.load_i3d(tmp_path / "x.safetensors")


# Fréchet distance.


def test_distance_of_gaussians_in_closed_form():
    """Independent features: (m1 - m2)^2 + (s1 - s2)^2 each."""
    rng = np.random.default_rng(0)
    unit = rng.standard_normal((400, 3))
    # Exactly white, so that moments are what they are meant to be.
    unit = (unit - unit.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(unit.T, bias=True))).T
    first, second = Moments.of(unit * [1, 2, 3]), Moments.of(unit[::-1] * [2, 2, 0.5] + [0, 1, -2])
    assert frechet_distance(first, second) == pytest.approx(1 + 0 + 6.25 + 0 + 1 + 4, rel=1e-9)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


def test_distance_of_correlated_gaussians():
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((50, 4)) @ rng.standard_normal((4, 4)), rng.standard_normal((60, 4)) + 1
    first, second = Moments.of(a), Moments.of(b)
    np.testing.assert_allclose(first.covariance, np.cov(a.T, bias=True))
    values = np.linalg.eigvals(first.covariance @ second.covariance)
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(first.covariance + second.covariance)
    assert frechet_distance(first, second) == pytest.approx(expected - 2 * np.sqrt(values.real).sum(), rel=1e-9)
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=1e-9)
    parts = Moments.of(a[:20]) + Moments.of(a[20:])
    assert frechet_distance(parts, second) == pytest.approx(frechet_distance(first, second), rel=1e-9)
    with pytest.raises(ValueError, match="1 and 60 samples"):
        frechet_distance(Moments.of(a[:1]), second)
    with pytest.raises(ValueError, match="expected \\(samples, width\\)"):
        Moments.of(a[0])


def test_the_video_distance_accumulates_over_batches():
    """Features that are the clips' brightness: the distance of all of them at once; sides of different numbers."""
    rng = np.random.default_rng(0)
    batches = [[rng.random((count, 5, 4, 4, 3), np.float32) for count in (3, 40)] for _ in range(2)]
    distance = VideoDistance(lambda clips: jnp.mean(clips, axis=(2, 3, 4)), "rfvd")
    for recorded, made in batches:
        distance.add(recorded, made)
    found = distance.result()
    assert (found["rfvd_recorded_clips"], found["rfvd_made_clips"]) == (6, 80)
    sides = [np.concatenate([batch[side] for batch in batches]).mean(axis=(2, 3, 4)) for side in (0, 1)]
    assert found["rfvd"] == pytest.approx(frechet_distance(*map(Moments.of, sides)), rel=1e-4)


def test_the_distance_of_equal_sets_is_not_negative():
    """Fewer clips than features, as always: rounding made it -5e-5."""
    moments = Moments.of(100 + 5 * np.random.default_rng(0).normal(size=(10, 40)))
    assert 0 <= frechet_distance(moments, moments) < 1e-3


def test_the_video_distance_refuses_pixels_of_eight_bits():
    distance, clips = (
        VideoDistance(lambda clips: jnp.mean(clips, axis=(2, 3, 4))),
        np.full((2, 5, 4, 4, 3), 0.5, np.float32),
    )
    with pytest.raises(ValueError, match="fvd: generated clips are uint8 from 7 to 7; give floats in \\[0, 1\\]"):
        distance.add(clips, np.full(clips.shape, 7, np.uint8))
    with pytest.raises(ValueError, match="fvd: recorded clips are float32 from -1 to -1"):
        distance.add(clips * 0 - 1, clips)


# Predictions.


def test_the_best_sample_of_each_clip_counts():
    scores = jnp.array([[[1.0, 5.0], [4.0, 4.0]], [[2.0, 2.0], [0.0, 1.0]]])
    assert best_of(scores, higher_is_better=True).tolist() == [4.0, 2.0]
    assert best_of(scores, higher_is_better=False).tolist() == [3.0, 0.5]
    assert by_horizon(scores).tolist() == [1.75, 3.0]
    whole = with_context(scores, jnp.array([[9.0], [8.0]]))
    assert whole.shape == (2, 2, 3) and whole[1, 0].tolist() == [8.0, 2.0, 2.0]


def test_distance_of_features_is_that_of_their_moments():
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((20, 3)), 1.0 + rng.standard_normal((30, 3))
    assert frechet_distance(first, second) == frechet_distance(Moments.of(first), Moments.of(second)) > 1
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(first[:1], second)
