"""Videos of any length to files of latents and back: chunks equal the whole video, and sizes are restored."""

import json
import shutil

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jvgen.autoencoding.evaluation import _check_clip, evaluate_vae
from jvgen.autoencoding.streaming import StreamingVAE
from jvgen.data.store.sources import open_source
from jvgen.data.stream.source_checks import check_latents
from jvgen.data.video_files import encode_video, probe_file, read_frames
from jvgen.interop.digest import DIGESTS_FILE, content_digest
from jvgen.interop.from_torch import import_folder
from jvgen.interop.safetensors_file import SafetensorsFile, TensorSpec, write
from jvgen.interop.to_torch import export_network
from jvgen.models.cogvideox_vae.config import CogVideoXVAEConfig
from jvgen.models.cogvideox_vae.model import CogVideoXVAE
from jvgen.models.cv_vae.config import CVVAEConfig
from jvgen.models.cv_vae.model import CVVAE
from jvgen.models.cv_vae.tiling import decode_tiled, encode_tiled
from jvgen.models.image_vae.config import ImageVAEConfig
from jvgen.models.image_vae.model import ImageVAE
from jvgen.nn.network import Network
from jvgen.tasks.pixels import from_uint8, to_uint8

pytestmark = pytest.mark.usefixtures("quick_compilations")

IMAGE = ImageVAEConfig(block_channels=(4, 8), layers_per_block=1, groups=2, mid_attention=False)
CAUSAL = CVVAEConfig.causal(IMAGE)
PUBLISHED = CVVAEConfig.sd3().replace(
    latent_channels=4, block_channels=(4, 8), layers_per_block=1, groups=2, time_levels_down=(0,), time_levels_up=(0,),
    tile_frames=4, tile_size=8, tile_overlap=0.25,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def export(config):
        name = f"{type(config).__name__}-{getattr(config, 'class_name', '')}"
        if name not in made:
            kinds = {ImageVAEConfig: ImageVAE, CogVideoXVAEConfig: CogVideoXVAE}
            kind = kinds.get(type(config), CVVAE)
            network = Network.of(lambda rngs: kind(config, rngs=rngs))
            parameters = jax.jit(network.init)(jax.random.key(1))
            made[name] = export_network(config, parameters, tmp_path_factory.mktemp("vae") / "vae")
        return made[name]

    return export


def frames_of(count: int, height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    start = rng.integers(0, 256, (1, height, width, 3))
    return ((start + 3 * np.arange(count)[:, None, None, None]) % 256).astype(np.uint8)


def coded(coder: StreamingVAE, video: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    latents = list(coder.encode(iter(video), len(video)))
    flat = np.concatenate(latents)
    return latents, list(coder.decode(iter(flat), len(flat)))


def whole(config, folder, video: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Latents and frames of the network on the whole video."""
    network = Network.of(lambda rngs: CVVAE(config, rngs=rngs))
    parameters = jax.device_put(import_folder(folder)[1])
    encode, decode = (
        lambda x, m=method: jax.jit(lambda p, x: network.apply(p, x, method=m))(parameters, x)
        for method in ("encode", "decode")
    )
    clip = from_uint8(jnp.asarray(video[None]))
    if not config.is_causal:
        moments = encode_tiled(encode, clip, config)
        return np.asarray(moments[0, ..., :4]), np.asarray(to_uint8(decode_tiled(decode, moments[..., :4], config)[0]))
    moments = encode(clip)
    return np.asarray(moments[0, ..., :4]), np.asarray(to_uint8(decode(moments[..., :4])[0]))


@pytest.mark.parametrize("config", [CAUSAL, PUBLISHED], ids=["causal", "published"])
def test_chunks_equal_the_whole_video(config, folder):
    video = frames_of(9, 8, 12)
    coder = StreamingVAE(folder(config), chunk_frames=4)
    latents, shown = coded(coder, video)
    assert [len(part) for part in latents] == [3, 2] and [len(part) for part in shown] == [5, 4]
    expected, decoded = whole(config, folder(config), video)
    np.testing.assert_allclose(np.concatenate(latents), expected, atol=1e-5)
    assert np.abs(np.concatenate(shown).astype(int) - decoded).max() <= 1


@pytest.mark.parametrize("config", [CAUSAL, IMAGE], ids=["causal", "image"])
def test_bfloat16_is_close_to_float32(config, folder):
    """Its unit is 2^-8; after a few dozen layers the error is a few units."""
    video = frames_of(9, 8, 12)
    (exact, _), (near, shown) = (
        coded(StreamingVAE(folder(config), chunk_frames=4, compute_dtype=dtype), video)
        for dtype in ("float32", "bfloat16")
    )
    exact, near = np.concatenate(exact), np.concatenate(near)
    assert near.dtype == np.float32 and np.concatenate(shown).shape == (9, 8, 12, 3)
    error = np.abs(near - exact).max() / np.abs(exact).max()
    assert 0 < error < 8 * 2**-8


def test_image_vaes_code_frames_separately(folder):
    coder = StreamingVAE(folder(IMAGE), chunk_frames=3)
    latents, shown = coded(coder, frames_of(5, 8, 8))
    assert [part.shape for part in latents] == [(4, 4, 4, 4), (1, 4, 4, 4)]
    alone = list(coder.encode(iter(frames_of(5, 8, 8)[4:]), 1))[0]
    np.testing.assert_allclose(latents[1], alone, atol=1e-6)
    assert np.concatenate(shown).shape == (5, 8, 8, 3)


def test_sizes_are_padded_by_repeating_the_last_frame_row_and_column(folder):
    coder = StreamingVAE(folder(CAUSAL))
    video = frames_of(4, 7, 9)
    assert coder.padded_size(4, 7, 9) == (5, 8, 10) and coder.latent_shape(4, 7, 9) == (3, 4, 5, 4)
    filled = np.pad(np.concatenate([video, video[-1:]]), ((0, 0), (0, 1), (0, 1), (0, 0)), mode="edge")
    np.testing.assert_array_equal(*(next(coder.encode(iter(v), len(v))) for v in (video, filled)))
    with pytest.raises(ValueError, match="ends after 4 of 7 frames"):
        list(coder.encode(iter(video), 7))


def test_commands_encode_and_decode(jvgen, folder, tmp_path):
    film = tmp_path / "film.mp4"
    film.write_bytes(encode_video(frames_of(6, 14, 17) // 2 + 60, 12.0))
    vae, latents, videos = folder(CAUSAL), tmp_path / "latents", tmp_path / "videos"
    done = jvgen("encode", film, "--vae", vae, "--out", latents, "--chunk-frames", 2, "--dtype", "float16")
    assert done.status == 0 and "6 frames of 14x17, padded to 7 frames of 14x18" in done.out, done.err
    stored = np.load(latents / "film.npy")
    assert stored.shape == (4, 7, 9, 4) and stored.dtype == np.float16
    about = json.loads((latents / "film.json").read_text())
    assert (about["frames"], about["height"], about["width"], about["frames_per_second"]) == (6, 14, 17, 12.0)
    assert not list(latents.glob("*.partial"))

    done = jvgen("decode", latents / "film.npy", "--vae", vae, "--out", videos, "--chunk-frames", 2, "--crf", 1)
    assert done.status == 0 and "6 frames of 14x17" in done.out, done.err
    info = probe_file(videos / "film.mp4")
    assert (info.frames, info.height, info.width, info.frames_per_second) == (6, 14, 17, 12.0)
    _, expected = whole(
        CAUSAL, vae, np.pad(np.stack(list(read_frames(film))), ((0, 1), (0, 0), (0, 1), (0, 0)), "edge")
    )
    seen = np.stack(list(read_frames(videos / "film.mp4"))).astype(int)
    assert np.abs(seen - expected[:6, :14, :17]).mean() < 2

    again = jvgen("encode", film, "--vae", vae, "--out", latents)
    assert again.status == 2 and "film.npy exists" in again.err
    other = jvgen("decode", latents / "film.npy", "--vae", folder(IMAGE), "--out", tmp_path / "other")
    assert other.status == 2 and "was encoded by the autoencoder" in other.err


def test_gray_transparent_and_variable_rate_videos(jvgen, folder, tmp_path):
    gray, clear = tmp_path / "gray.mkv", tmp_path / "clear.png"
    with av.open(str(gray), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = 8, 8, "gray"
        for number, frame in enumerate(frames_of(5, 8, 8)):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[..., 0]), format="gray")
            # An uneven rate: frames are numbered, and their times are not looked at.
            picture.pts = [0, 1, 5, 6, 30][number]
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    Image.fromarray(np.dstack([frames_of(1, 8, 8)[0], np.full((8, 8), 9, np.uint8)])).save(clear)
    done = jvgen("encode", gray, clear, "--vae", folder(CAUSAL), "--out", tmp_path / "latents")
    assert done.status == 0 and "5 frames of 8x8" in done.out and "1 frames of 8x8" in done.out, done.err
    found = np.stack(list(read_frames(gray)))
    np.testing.assert_array_equal(found, frames_of(5, 8, 8)[..., :1].repeat(3, axis=-1))
    # Its pixels are nearly transparent, on white.
    on_white = 255 - (255.0 - frames_of(1, 8, 8)[0]) * 9 / 255
    np.testing.assert_allclose(next(read_frames(clear)), on_white, atol=1)
    done = jvgen("decode", tmp_path / "latents" / "clear.npy", "--vae", folder(CAUSAL), "--out", tmp_path / "back")
    assert done.status == 0 and (tmp_path / "back" / "clear.png").is_file(), done.err


def test_mistakes_are_reported_before_coding(jvgen, folder, tmp_path):
    film = tmp_path / "film.mp4"
    clip = encode_video(frames_of(40, 16, 16), 8.0)
    film.write_bytes(clip)
    cut, empty, text = tmp_path / "cut.mp4", tmp_path / "empty.mp4", tmp_path / "text.mp4"
    cut.write_bytes(clip[: len(clip) // 2])
    empty.write_bytes(b"")
    text.write_text("no video")
    vae, out = folder(CAUSAL), tmp_path / "latents"

    def told(*words, by="encode"):
        done = jvgen(by, *words, "--out", out)
        assert done.status == 2, done.out
        return done.err

    assert "cut.mp4" in told(cut, "--vae", vae) and not list(out.glob("*.npy*"))
    assert "empty" in told(empty, "--vae", vae) and "not a readable video" in told(text, "--vae", vae)
    assert "no such file" in told(tmp_path / "none.mp4", "--vae", vae)
    assert "--chunk-frames: '0': must be at least 1" in told(film, "--vae", vae, "--chunk-frames", 0)
    (tmp_path / "twice").mkdir()
    (tmp_path / "twice" / "film.webm").write_bytes(clip)
    assert "several sources" in told(film, tmp_path / "twice" / "film.webm", "--vae", vae)
    (tmp_path / "film.npy").write_bytes(b"nothing")
    assert "film.json" in told(tmp_path / "film.npy", "--vae", vae, by="decode")
    (tmp_path / "film.json").write_text("{}")
    assert "film.json does not describe latents" in told(tmp_path / "film.npy", "--vae", vae, by="decode")


@pytest.fixture
def damaged(folder, tmp_path):
    """Copies of the image VAE with tensors of a part so large that its results are infinite; NaN is not even read."""

    def make(part: str):
        copy = tmp_path / part
        shutil.copytree(folder(IMAGE), copy)
        (copy / DIGESTS_FILE).unlink()
        path = copy / "diffusion_pytorch_model.safetensors"
        tensors = dict(SafetensorsFile(path))
        changed = {name: array * np.float32(1e30 if name.startswith(part) else 1) for name, array in tensors.items()}
        write(path, {name: TensorSpec(array.shape, array.dtype) for name, array in changed.items()}, changed.items())
        return copy

    return make


def test_numbers_that_are_not_finite_become_no_file(jvgen, damaged, scenes, tmp_path):
    Image.new("RGB", (8, 8), (200, 30, 30)).save(tmp_path / "red.png")
    vae = damaged("decoder")
    words = ("--vae", vae, "--out", tmp_path / "latents")
    assert jvgen("encode", tmp_path / "red.png", *words).status == 0
    decode = ("decode", tmp_path / "latents" / "red.npy", "--vae", vae, "--out", tmp_path / "videos")
    encoder = damaged("encoder")
    build = ("data", "build", "latents", scenes, "--vae", encoder, "--size", "16x16", "--out", tmp_path / "data")
    size = ("--frames", 1, "--size", "16x16", "--batches", 1, "--batch-size", 2)
    commands = {
        f"pixels of the latent frames 0 to 0: NaN or infinity from the VAE {vae} in float32": decode,
        f"latents of frames 0 to 0: NaN or infinity from the VAE {encoder} in float32": (
            "encode", tmp_path / "red.png", "--vae", encoder, "--out", tmp_path / "videos",
        ),
        f"latents of a clip: NaN or infinity from the VAE {encoder}": build,
        f"NaN or infinity from the VAE {vae}": ("evaluate", "--vae", vae, "--data", scenes, *size),
    }  # fmt: skip
    for said, command in commands.items():
        done = jvgen(*command)
        assert done.status == 65 and said in done.err, done.err
    # Latents that are not finite are no fault of the VAE.
    latents = np.load(tmp_path / "latents" / "red.npy")
    latents[..., 0] = np.inf
    np.save(tmp_path / "latents" / "red.npy", latents)
    done = jvgen(*decode)
    assert done.status == 65 and "red.npy: latent frames 0 to 0 hold NaN or infinity" in done.err
    assert not list((tmp_path / "videos").iterdir()) and not (tmp_path / "data").exists()


def test_latents_of_a_data_set(jvgen, folder, scenes, tmp_path):
    """Clips of 4 frames hold one group of 2 after their first frame; latents carry their moments."""
    out = tmp_path / "latents"
    done = jvgen("data", "build", "latents", scenes, "--vae", folder(CAUSAL), "--size", "16x16", "--out", out)
    assert done.status == 0 and "deviation" in done.out, done.err
    record = open_source(out, "train").read(0)
    assert record.frames == 3 and record.latents.shape == (1, 2, 8, 8, 8)
    assert check_latents(out, content_digest(str(folder(CAUSAL))))["group"] == 2


def test_lengths_that_cogvideox_decodes_to_other_lengths_are_refused():
    for frames, near in ((13, "9 or 17"), (0, "1 or 9")):
        with pytest.raises(ValueError, match=f"--frames {frames}: this VAE takes 8n \\+ 1; give {near}"):
            _check_clip(CogVideoXVAEConfig.tiny(), frames, (16, 16))
    _check_clip(CogVideoXVAEConfig.tiny(), 17, (16, 16))


def test_lengths_that_cogvideox_takes_are_decoded_to_themselves(folder):
    """An even number of latent frames is decoded as if none were the first of a clip, 4 frames each."""
    for chunk, temporal in ((2, 4), (4, 4), (2, 2), (2, 1)):
        config = CogVideoXVAEConfig.tiny().replace(decode_chunk_frames=chunk, temporal_downsampling=temporal)
        config.validate()
        network = Network.of(lambda rngs, config=config: CogVideoXVAE(config, rngs=rngs))
        step = config.frame_step
        for frames in (1, 1 + step, 1 + 3 * step):
            config.check_clip(frames, 16, 16)
            latents = jax.ShapeDtypeStruct((1, *config.latent_shape(frames, 16, 16), 4), jnp.float32)
            decoded = jax.eval_shape(lambda p, z, n=network: n.apply(p, z, method="decode"), network.shapes, latents)
            assert decoded.shape[1] == frames, (chunk, temporal)
    for chunk in (1, 3):
        with pytest.raises(ValueError, match=f"decode_chunk_frames = {chunk}: must be even, .* take {chunk + 1}"):
            CogVideoXVAEConfig.tiny().replace(decode_chunk_frames=chunk).validate()
    coder = StreamingVAE(
        folder(CogVideoXVAEConfig.tiny().replace(block_channels=(4, 8), groups=2, temporal_downsampling=2))
    )
    video = frames_of(3, 8, 8)
    assert coder.padded_size(3, 8, 8) == (5, 8, 8)
    latents, shown = coded(coder, video)
    assert (sum(map(len, latents)), sum(map(len, shown))) == (3, 5), "two latents would be four frames"


def test_evaluation_of_an_exported_vae(jvgen, folder, scenes, tmp_path):
    words = ["--data", scenes, "--size", "16x16", "--batches", 1, "--batch-size", 2]
    done = jvgen(
        "evaluate", "--vae", folder(CAUSAL), "--image-vae", folder(IMAGE), "--frames", 3, "--worst", 1,
        "--out", tmp_path / "report", *words,
    )  # fmt: skip
    assert done.status == 0 and "perceptual_laplacian is not LPIPS" in done.out, done.err
    report = json.loads((tmp_path / "report" / "metrics.json").read_text())
    found = report["metrics"]
    assert {"psnr", "image_decoder/ssim", "image_latents/psnr", "latent/deviation_3", "image_latent/mean_0"} < set(
        found
    )
    assert len(report["worst"]) == 1 and report["worst"][0]["psnr"] <= found["psnr"] + 1e-6
    with Image.open(tmp_path / "report" / "worst.png") as sheet:
        assert sheet.size == (3 * 16 + 4, 2 * 16 + 2)
    # The distance of reconstructions, by features that are the clips' own means.
    measured = evaluate_vae(
        folder(CAUSAL), str(scenes), frames=3, size=(16, 16), batches=1, batch=2, image_vae=folder(IMAGE),
        features=lambda clips: clips.mean(axis=(2, 3, 4)),
    )  # fmt: skip
    assert measured["rfvd_made_clips"] == 2 and measured["rfvd"] > 0
    assert measured["psnr"] == pytest.approx(found["psnr"])
    # No clip counts twice: of more batches than the data set fills, it is the mean over all eight.
    some, every = (
        evaluate_vae(
            folder(CAUSAL), str(scenes), frames=3, size=(16, 16), batches=n, batch=3, out=tmp_path / f"{n}", worst=9
        )
        for n in (2, 4)
    )
    worst = [row["record"] for row in json.loads((tmp_path / "4" / "metrics.json").read_text())["worst"]]
    assert len(worst) == len(set(worst)) == 8 and some != every
    assert every == evaluate_vae(folder(CAUSAL), str(scenes), frames=3, size=(16, 16), batches=3, batch=3)
    for wrong, words_of in [
        (["--vae", folder(CAUSAL), "--frames", 4], "--frames 4: this VAE takes 2n + 1; give 3 or 5"),
        (["--vae", folder(CAUSAL), "--frames", 3, "--image-vae", folder(CAUSAL)], "not an image VAE"),
        ([tmp_path, "--vae", folder(CAUSAL)], "--size: only valid with --vae and no RUN"),
        ([], "give RUN"),
    ]:
        done = jvgen("evaluate", *wrong, *words)
        assert done.status == 2 and words_of in done.err, done.err
