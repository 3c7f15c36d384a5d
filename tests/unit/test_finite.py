"""NaN and infinity between networks and files: found, named, and never written."""

import contextlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jvgen import exit_codes
from jvgen.evaluation.distribution import VideoDistance
from jvgen.finite import Clips, Finite, NotFinite, clips_of, narrowed, not_finite
from jvgen.runs.faults import Faults
from jvgen.tasks.pixels import to_clips, to_uint8
from jvgen.training.evaluation import Evaluator

BF16 = np.dtype(ml_dtypes.bfloat16)
LARGE = np.finfo(np.float32).max
# Values, dtype of the file, and what the error says; None if they fit.
CASTS = {
    "ordinary": ([1.0, -2.5], np.float16, None),
    "largest of float16": ([65504.0, -65519.0], np.float16, None),
    "rounded up past float16": ([0.0, 65520.0], np.float16, "reaches 65520, but float16 ends at 65504"),
    "negative past float16": ([-7e4, 1.0], np.float16, "reaches 70000, but float16"),
    "rounded up past bfloat16": ([LARGE], BF16, "but bfloat16 ends at 3.38953e+38"),
    "past float16, in bfloat16": ([7e4], BF16, None),
    "past float16, in float32": ([7e4], np.float32, None),
    "NaN": ([1.0, np.nan, 2.0], np.float16, "holds NaN or infinity"),
    "NaN that is not cast": ([np.nan], np.float32, "holds NaN or infinity"),
    "infinity": ([-np.inf, 0.0], BF16, "holds NaN or infinity"),
    "nothing": ([], np.float16, None),
}


@pytest.mark.parametrize("source", [np.float32, np.float64])
@pytest.mark.parametrize("name", CASTS)
def test_casts_keep_numbers_finite_or_say_what_does_not_fit(name, source):
    values, dtype, said = CASTS[name]
    array = np.array(values, source)
    if said is None:
        cast = narrowed("a/b", array, dtype)
        assert cast.dtype == dtype
        assert np.isfinite(cast.astype(np.float64)).all()
        return
    with pytest.raises(NotFinite, match="^a/b ") as error:
        narrowed("a/b", array, dtype)
    assert said in str(error.value)
    assert exit_codes.of_error(error.value) == exit_codes.DIVERGED


def test_casts_of_half_precision_arrays_see_nan_and_range():
    for bad, said in ((np.nan, "NaN"), (1e5, "99840")):
        with pytest.raises(NotFinite, match=said):
            narrowed("x", np.array([0.0, bad, 1.0], BF16), np.float16)
    assert narrowed("ids", np.array([70000]), np.int64).tolist() == [70000]


def finite(**changes) -> Finite:
    rows = {"text": np.ones(3, bool), "steps": np.full(3, 4), "pixels": np.ones(3, bool), "total": np.int32(4)}
    return Finite(**rows | {name: np.array(value) for name, value in changes.items()})


FAULTS = {
    "text": (finite(text=[True, False, True], steps=[4, 0, 4], pixels=[True, False, True]), "caption", "text encoder"),
    "first step": (finite(steps=[4, 0, 4]), "after denoising step 1 of 4", "denoiser"),
    "last step": (finite(steps=[4, 3, 4]), "after denoising step 4 of 4", "denoiser"),
    "pixels": (finite(pixels=[True, False, True]), "decoded pixels", "VAE"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_first_fault_of_a_clip_is_named_and_the_others_are_kept(name):
    made, what, network = FAULTS[name]
    faults = Faults("float16", "--dtype")
    assert list(faults.finite_rows(["clip 0", "clip 1"], made)) == [0]
    faults.stop_without_a_finite_clip()
    with pytest.raises(NotFinite) as error:
        faults.raise_if_any()
    message = str(error.value)
    assert message.startswith("1 of 2 clips hold NaN or infinity and were not written")
    for word in ("clip 1: ", what, f"the {network} in float16", "--dtype bfloat16"):
        assert word in message
    assert "clip 0" not in message
    assert made.all().tolist() == [True, False, True]


def test_a_batch_without_a_finite_clip_ends_the_call():
    faults = Faults("float32")
    list(faults.finite_rows(["a", "b"], finite(steps=[4, 4, 4])))
    faults.stop_without_a_finite_clip()
    with pytest.raises(NotFinite, match="2 of 4 clips .* ended with this batch"):
        list(faults.finite_rows(["c", "d"], finite(steps=[1, 2, 4])))
        faults.stop_without_a_finite_clip()
    # With no faults nothing is raised.
    Faults("float32").raise_if_any()


def test_pixels_of_numbers_that_are_not_finite_are_marked():
    values = jnp.zeros((3, 1, 2, 2, 3)).at[1, 0, 0, 0, 0].set(jnp.nan).at[2, 0, 1, 1, 2].set(-jnp.inf)
    assert to_clips(values).finite.tolist() == [True, False, False]
    assert clips_of(values.astype(jnp.bfloat16), to_uint8).finite.tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("dtype", "option", "said"),
    [
        ("float16", "--dtype", "take --dtype bfloat16"),
        ("bfloat16", "--dtype", "--dtype float32"),
        ("float32", "--dtype", "weights are damaged"),
        ("bfloat16", None, "weights are damaged"),
    ],
)
def test_the_error_says_what_to_do(dtype, option, said):
    error = not_finite("frames 0 to 3 of film.npy", "VAE", dtype, option)
    assert str(error).startswith(f"frames 0 to 3 of film.npy: NaN or infinity from the VAE in {dtype}.")
    assert said in str(error)


def test_samples_of_training_that_are_not_finite_are_left_out():
    clips = np.zeros((2, 3, 4, 4, 3), np.uint8)
    shown = {
        "data": clips, "good": Clips(clips, np.array([True, True])), "bad": Clips(clips, np.array([True, False])),
    }  # fmt: skip
    state = SimpleNamespace(parameters={}, ema={}, frozen={}, key=jax.random.key(0), step=np.int32(7))
    program = SimpleNamespace(
        shard_batch=lambda arrays, bucket: arrays,
        experiment=SimpleNamespace(training=SimpleNamespace(precision=SimpleNamespace(compute_dtype="bfloat16"))),
    )
    programs = SimpleNamespace(evaluation=lambda method, bucket: lambda *arguments: shown)
    batches = lambda start, stop: contextlib.nullcontext(iter([SimpleNamespace(arrays={}, bucket=None)]))  # noqa: E731
    said = []
    pixels = Evaluator(program, batches, programs, said.append).visualize(state)
    assert sorted(pixels) == ["data", "good"]
    (warning,) = said
    assert "'bad' samples of step 7 are left out: 1 of 2 clips" in warning and "in bfloat16" in warning


@pytest.mark.parametrize(("bad", "side"), [(0, "recorded"), (1, "generated")])
def test_a_distance_of_clips_that_are_not_finite_is_an_error(bad, side):
    clips = [np.zeros((2, 1, 2, 2, 3), np.float32) for _ in range(2)]
    clips[bad][1, 0, 0, 0, 0] = np.nan
    distance = VideoDistance(lambda clips: clips.mean(axis=(1, 2, 3)), "fvd")
    with pytest.raises(NotFinite, match=f"fvd: features of {side} clips hold NaN"):
        distance.add(*clips)
