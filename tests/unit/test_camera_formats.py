"""Camera files of other programs: points project where the program's own formulas say; wrong files are named."""

import contextlib
import gzip
import json
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest

from jvgen.data.image_files import DecodeError
from jvgen.data.undistortion import undistorted
from jvgen.geometry import paths
from jvgen.geometry.cameras import Cameras, inverse, project
from jvgen.geometry.formats import colmap
from jvgen.geometry.formats.co3d import read_co3d
from jvgen.geometry.formats.colmap import read_colmap
from jvgen.geometry.formats.nerfstudio import read_nerfstudio
from jvgen.geometry.formats.spatialvid import read_spatialvid

FRAMES, HEIGHT, WIDTH = 4, 60, 90
FX, FY, CX, CY = 80.0, 76.0, 47.0, 28.0
NAMES = ("frame_2.png", "frame_9.png", "frame_10.png", "frame_11.png")
ORDER = (2, 0, 3, 1)  # in which files have them


@pytest.fixture(scope="module")
def world() -> np.ndarray:
    """World-to-camera matrices of cameras in a circle that also roll."""
    circle = paths.named_paths("circle", 4, FRAMES)[1]
    angle = 0.4 * np.arange(FRAMES)
    roll = np.zeros((FRAMES, 3, 3))
    roll[:, 0, 0] = roll[:, 1, 1] = np.cos(angle)
    roll[:, 0, 1], roll[:, 1, 0], roll[:, 2, 2] = -np.sin(angle), np.sin(angle), 1
    return roll @ circle


@pytest.fixture(scope="module")
def points(world) -> np.ndarray:
    """Points (P, 3) in front of all cameras."""
    found = np.random.default_rng(1).normal(0, 0.3, (20, 3)) + [0, 0, 4]
    assert (np.einsum("fij,pj->fpi", world[..., :3], found) + world[:, None, :, 3])[..., 2].min() > 0.5
    return found


def quaternion(rotation: np.ndarray) -> np.ndarray:
    """w first, by the eigenvector of Bar-Itzhack's matrix."""
    r = rotation
    matrix = np.array(
        [
            [r[0, 0] - r[1, 1] - r[2, 2], 0, 0, 0],
            [r[0, 1] + r[1, 0], r[1, 1] - r[0, 0] - r[2, 2], 0, 0],
            [r[0, 2] + r[2, 0], r[1, 2] + r[2, 1], r[2, 2] - r[0, 0] - r[1, 1], 0],
            [r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1], np.trace(r)],
        ]
    )
    values, vectors = np.linalg.eigh(matrix / 3)
    x, y, z, w = vectors[:, np.argmax(values)]
    return np.array([w, x, y, z]) * np.sign(w if w else 1)


def nerfstudio(folder: Path, world: np.ndarray, **changes) -> Path:
    """Camera-to-world matrices with the axes right, up, backward as columns."""
    frames = []
    for number in ORDER:
        to_world = np.linalg.inv(np.vstack([world[number], [0, 0, 0, 1]]))
        to_world[:, 1:3] *= -1
        frames.append({"file_path": f"images/{NAMES[number]}", "transform_matrix": to_world.tolist()})
    document = {"w": WIDTH, "h": HEIGHT, "fl_x": FX, "fl_y": FY, "cx": CX, "cy": CY, "camera_model": "OPENCV",
                "k1": 0.0, "frames": frames, **changes}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "transforms.json").write_text(json.dumps(document))
    return folder / "transforms.json"


def colmap_binary(folder: Path, world: np.ndarray, model: int = 1, parameters=(FX, FY, CX, CY)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cameras.bin").write_bytes(
        struct.pack("<QiiQQ", 1, 7, model, WIDTH, HEIGHT) + struct.pack(f"<{len(parameters)}d", *parameters)
    )
    content = struct.pack("<Q", FRAMES)
    for number in ORDER:
        pose = (*quaternion(world[number, :, :3]), *world[number, :, 3])
        content += struct.pack("<i7di", number + 1, *pose, 7) + NAMES[number].encode() + b"\0"
        content += struct.pack("<Q", number) + struct.pack("<ddq", 1.0, 2.0, 3) * number
    (folder / "images.bin").write_bytes(content)
    return folder


def colmap_text(folder: Path, world: np.ndarray, model: str = "PINHOLE", parameters=(FX, FY, CX, CY)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    words = " ".join(map(repr, parameters))
    (folder / "cameras.txt").write_text(f"# CAMERA_ID, MODEL, ...\n7 {model} {WIDTH} {HEIGHT} {words}\n")
    lines = ["# Image list with two lines of data per image:"]
    for number in ORDER:
        pose = (*quaternion(world[number, :, :3]), *world[number, :, 3])
        points = "1.0 2.0 3 " * number  # none for the first image: an empty line
        lines += [f"{number + 1} {' '.join(repr(float(v)) for v in pose)} 7 {NAMES[number]}", points]
    (folder / "images.txt").write_text("\n".join(lines) + "\n")
    return folder


def co3d(
    folder: Path, world: np.ndarray, form: str = "ndc_isotropic", *, seconds: float | None = 0.25, **changes
) -> Path:
    """Row vectors, axes left, up, forward; coordinates from -1 to 1 that grow to the left and up.

    Without `seconds` between frames their times are those of the published files, -1.
    """
    half = np.array([WIDTH, HEIGHT]) / 2
    scale = half if form == "ndc_norm_image_bounds" else half.min()
    annotations = []
    for number in ORDER:
        rotation, translation = world[number, :, :3].T.copy(), world[number, :, 3].copy()
        rotation[:, :2] *= -1
        translation[:2] *= -1
        view = {
            "R": rotation.tolist(), "T": translation.tolist(), "intrinsics_format": form,
            "focal_length": (np.array([FX, FY]) / scale).tolist(),
            "principal_point": ((half - [CX, CY]) / scale).tolist(), **changes,
        }  # fmt: skip
        annotations.append({
            "sequence_name": "12_34_56", "frame_number": number,
            "frame_timestamp": -1.0 if seconds is None else seconds * number,
            "image": {"path": f"car/12_34_56/images/{NAMES[number]}", "size": [HEIGHT, WIDTH]}, "viewpoint": view,
        })  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "frame_annotations.jgz").write_bytes(gzip.compress(json.dumps(annotations).encode()))
    return folder / "frame_annotations.jgz"


def spatialvid(folder: Path, world: np.ndarray, numbers=(0, 5, 10, 15)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    poses = [[*matrix[:, 3], *np.roll(quaternion(matrix[:, :3]), -1)] for matrix in world]
    np.save(folder / "poses.npy", np.array(poses, np.float32))
    np.save(folder / "intrinsics.npy", np.tile([FX / WIDTH, FY / HEIGHT, CX / WIDTH, CY / HEIGHT], (len(world), 1)))
    (folder / "indexes.txt").write_text("".join(f"{row} {number}\n" for row, number in enumerate(numbers)))
    return folder


# Where each program's own formulas put a point (P, 3), in pixels from the edge of the image.


def shown_by_opencv(world: np.ndarray, points: np.ndarray) -> np.ndarray:
    seen = points @ world[:, :3].T + world[:, 3]
    return np.stack([FX * seen[:, 0] / seen[:, 2] + CX, FY * seen[:, 1] / seen[:, 2] + CY], axis=1)


def shown_by_opengl(file: Path, name: str, points: np.ndarray) -> np.ndarray:
    document = json.loads(file.read_text())
    [frame] = [frame for frame in document["frames"] if frame["file_path"].endswith(name)]
    seen = (np.c_[points, np.ones(len(points))] @ np.linalg.inv(frame["transform_matrix"]).T)[:, :3]
    depth = -seen[:, 2]
    return np.stack([FX * seen[:, 0] / depth + CX, CY - FY * seen[:, 1] / depth], axis=1)


def shown_by_pytorch3d(file: Path, name: str, points: np.ndarray) -> np.ndarray:
    [view] = [
        a["viewpoint"] for a in json.loads(gzip.decompress(file.read_bytes())) if a["image"]["path"].endswith(name)
    ]
    seen = points @ np.array(view["R"]) + view["T"]
    ndc = np.array(view["focal_length"]) * seen[:, :2] / seen[:, 2:] + view["principal_point"]
    half = np.array([WIDTH, HEIGHT]) / 2
    return half - ndc * (half if view["intrinsics_format"] == "ndc_norm_image_bounds" else half.min())


def test_points_project_where_each_program_puts_them(tmp_path, world, points):
    file, other = nerfstudio(tmp_path / "n", world), co3d(tmp_path / "c", world)
    bounds, folder = co3d(tmp_path / "b", world, "ndc_norm_image_bounds"), spatialvid(tmp_path / "v", world)
    found = {
        "nerfstudio": (read_nerfstudio(file), lambda f: shown_by_opengl(file, NAMES[f], points)),
        "binary": (read_colmap(colmap_binary(tmp_path / "s", world)), lambda f: shown_by_opencv(world[f], points)),
        "text": (read_colmap(colmap_text(tmp_path / "t", world)), lambda f: shown_by_opencv(world[f], points)),
        "co3d": (read_co3d(other)["12_34_56"], lambda f: shown_by_pytorch3d(other, NAMES[f], points)),
        "bounds": (read_co3d(bounds)["12_34_56"], lambda f: shown_by_pytorch3d(bounds, NAMES[f], points)),
        "spatialvid": (read_spatialvid(folder).cameras, lambda f: shown_by_opencv(world[f], points)),
    }  # fmt: skip
    for name, (read, expected) in found.items():
        if name != "spatialvid":
            assert [image.rpartition("/")[2] for image in read.names] == list(NAMES), "numbers are in their order"
        tolerance = 1e-3 if name == "spatialvid" else 1e-8
        for frame in range(FRAMES):
            camera = Cameras(read.intrinsics[frame], read.extrinsics[frame])
            np.testing.assert_allclose(
                project(points, camera, (HEIGHT, WIDTH))[:, :2], expected(frame), atol=tolerance, err_msg=name
            )
        np.testing.assert_allclose(read.extrinsics, world, atol=1e-6, err_msg=name)
    assert found["co3d"][0].seconds.tolist() == [0, 0.25, 0.5, 0.75]


def test_opengl_matrices_are_inverses_with_two_axes_turned(world):
    """A camera at the origin that looks along -z of the world and up along y, as OpenGL's own."""
    from jvgen.geometry.formats.posed_images import from_opengl

    looking = from_opengl(np.eye(4))
    np.testing.assert_allclose(looking[:, :3] @ [0, 0, -1], [0, 0, 1])
    np.testing.assert_allclose(looking[:, :3] @ [0, 1, 0], [0, -1, 0])
    np.testing.assert_allclose(from_opengl(inverse(world) * [1, -1, -1, 1]), world, atol=1e-12)


@pytest.mark.parametrize(("model", "values", "coefficients"), [
    ("SIMPLE_PINHOLE", (80.0, 45.0, 30.0), {}),
    ("SIMPLE_RADIAL", (80.0, 45.0, 30.0, 0.1), {0: 0.1}),
    ("RADIAL", (80.0, 45.0, 30.0, 0.1, -0.02), {0: 0.1, 1: -0.02}),
    ("OPENCV", (80.0, 81.0, 45.0, 30.0, 0.1, -0.02, 0.003, 0.004), {0: 0.1, 1: -0.02, 2: 0.003, 3: 0.004}),
    ("FULL_OPENCV", (80.0, 81.0, 45.0, 30.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0), {n: n + 1.0 for n in range(8)}),
])  # fmt: skip
def test_camera_models_of_colmap(tmp_path, world, model, values, coefficients):
    number = next(number for number, (name, _) in colmap.MODELS.items() if name == model)
    for folder in (
        colmap_text(tmp_path / "t", world, model, values),
        colmap_binary(tmp_path / "b", world, number, values),
    ):
        found = read_colmap(folder)
        assert found.distortion[0].tolist() == [coefficients.get(place, 0.0) for place in range(8)]
        assert found.intrinsics[0].tolist() == [80 / 90, (80 if values[1] == 45 else 81) / 60, 0.5, 0.5]


def test_undistorted_images_show_points_where_the_pinhole_does():
    """Dots drawn where OpenCV's model of the lens puts them are found where the new intrinsics put them."""
    lens = np.array([-0.25, 0.06, 0.002, -0.001, 0, 0, 0, 0])
    height, width = 240, 320
    intrinsics = np.array([0.9, 1.2, 0.52, 0.47])
    matrix = np.array([[0.9 * width, 0, 0.52 * width - 0.5], [0, 1.2 * height, 0.47 * height - 0.5], [0, 0, 1]])
    directions = np.array([[x, y, 1.0] for x in (-0.3, 0.0, 0.25) for y in (-0.2, 0.1)])
    for direction in directions:
        [[place]] = cv2.projectPoints(direction[None], np.zeros(3), np.zeros(3), matrix, lens)[0]
        rows, columns = np.mgrid[:height, :width]
        dot = np.exp(-((columns - place[0]) ** 2 + (rows - place[1]) ** 2) / 8)
        image = np.repeat((255 * dot).astype(np.uint8)[..., None], 3, axis=2)
        new, pinhole = undistorted(image, intrinsics, lens)
        weight = new[..., 0] / new[..., 0].sum(dtype=float)
        center = np.array([(weight * (columns + 0.5)).sum(), (weight * (rows + 0.5)).sum()])
        expected = project(direction[None], Cameras(pinhole, np.eye(3, 4)), (height, width))[0, :2]
        np.testing.assert_allclose(center, expected, atol=0.15)
    white, _ = undistorted(np.full((height, width, 3), 255, np.uint8), intrinsics, lens)
    assert white.min() == 255


@pytest.mark.parametrize(
    ("focal", "coefficients", "holds"),
    [
        (0.9, (-0.45,), True),  # what it shows is a part of the image
        (0.5, (-0.45,), False),
        (0.5, (0.1, -0.9), False),
        (0.5, (-2.0,), False),
        (2.0, (-2.0,), True),
        (0.5, (0.0, 0.0, 0.3, 0.3), False),  # nothing that OpenCV finds is its inverse
    ],
)
def test_lenses_that_fold_the_image_are_refused(focal, coefficients, holds):
    image, lens = np.full((48, 64, 3), 255, np.uint8), np.zeros(8)
    lens[: len(coefficients)] = coefficients
    with contextlib.nullcontext() if holds else pytest.raises(DecodeError, match="folds the image over"):
        undistorted(image, np.array([focal, focal * 64 / 48, 0.5, 0.5]), lens)


def _edited(path: Path, edit) -> Path:
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))
    return path


def _mirrored(document: dict) -> None:
    matrix = np.array(document["frames"][0]["transform_matrix"])
    matrix[:3, 0] *= -1
    document["frames"][0]["transform_matrix"] = matrix.tolist()


@pytest.mark.parametrize(("edit", "message"), [
    (lambda d: d.update(frames=[]), r"transforms.json: frames is \[\]"),
    (lambda d: d["frames"][1].pop("file_path"), r"frames\[1\] has no file_path"),
    (lambda d: d.pop("fl_x"), "images/frame_10.png: fl_x is missing; expected a number"),
    (lambda d: d.update(w="90"), "w is '90'; expected a number"),
    (lambda d: d.update(w=0), "w = 0, h = 60"),
    (lambda d: d.update(camera_model="OPENCV_FISHEYE"), "camera_model = 'OPENCV_FISHEYE'; PINHOLE, .* are read"),
    (lambda d: d["frames"][0].pop("transform_matrix"), r"transform_matrix has the shape \(\)"),
    (lambda d: d["frames"][0].update(transform_matrix=[[1, 2], [3]]), "transform_matrix is not a matrix of numbers"),
    (lambda d: d["frames"][0]["transform_matrix"].__setitem__(3, [0, 0, 1, 1]), "the last row of transform_matrix"),
    (lambda d: d["frames"][0]["transform_matrix"][0].__setitem__(3, float("nan")), "frame_10.png has numbers that"),
    (_mirrored, "the matrix of images/frame_10.png is a mirror image"),
    (lambda d: d["frames"][0]["transform_matrix"][0].__setitem__(0, 3.0), "frame_10.png is not a rotation"),
    (lambda d: d.update(fl_y=-1.0), r"a focal length is not positive .*; fl_x and fl_y"),
    (lambda d: d.update(w=9, h=6, fl_x=2000), "look like pixels. fl_x, fl_y, cx and cy are in pixels"),
    (lambda d: d["frames"].append(d["frames"][0]), "images/frame_10.png occurs twice"),
])  # fmt: skip
def test_wrong_transforms_are_named(tmp_path, world, edit, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_nerfstudio(_edited(nerfstudio(tmp_path, world), edit))
    assert "transforms.json" in str(caught.value)


def test_wrong_models_of_colmap_are_named(tmp_path, world):
    def raises(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            read_colmap(tmp_path)

    raises("has neither cameras.bin and images.bin nor cameras.txt and images.txt")
    colmap_binary(tmp_path, world, 5, (1.0,) * 8)
    raises("cameras.bin: camera model OPENCV_FISHEYE; SIMPLE_PINHOLE, .* are read")
    colmap_binary(tmp_path, world, 99)
    raises("cameras.bin: camera model number 99")
    colmap_binary(tmp_path, world)
    images = (tmp_path / "images.bin").read_bytes()
    for cut in (4, 30, len(images) - 5):
        (tmp_path / "images.bin").write_bytes(images[:cut])
        raises("images.bin: truncated")
    (tmp_path / "images.bin").write_bytes(images + b"more")
    raises("images.bin: 4 bytes follow its end")
    (tmp_path / "images.bin").write_bytes(images.replace(struct.pack("<i", 7), struct.pack("<i", 8)))
    raises("images.bin: frame_10.png has camera 8, which cameras.bin lacks")
    colmap_binary(tmp_path, np.concatenate([0 * world[:, :, :3], world[:, :, 3:]], axis=2))
    content = (tmp_path / "images.bin").read_bytes()
    (tmp_path / "images.bin").write_bytes(content[:12] + bytes(32) + content[44:])
    raises("the quaternion of frame_10.png has the length 0; that of a rotation is 1")
    for name in ("cameras.bin", "images.bin"):
        (tmp_path / name).unlink()
    colmap_text(tmp_path, world, "FOV", (1.0,) * 5)
    raises("cameras.txt: camera model FOV")
    colmap_text(tmp_path, world, "PINHOLE", (1.0,) * 3)
    raises("cameras.txt, line 2: 7 words; a camera of PINHOLE has")
    colmap_text(tmp_path, world)
    text = (tmp_path / "images.txt").read_text()
    (tmp_path / "images.txt").write_text(text.replace(" 7 frame_10", " frame_10"))
    raises("images.txt, line 2: 9 words; an image has")
    (tmp_path / "images.txt").write_text(text.replace("3 ", "x ", 1))
    raises("images.txt, line 2: could not convert string to float: 'x'")


@pytest.mark.parametrize(("changes", "message"), [
    ({"R": [[1, 0], [0, 1]]}, r"12_34_56: R has the shape \(2, 2\), not \(3, 3\)"),
    ({"R": (-np.eye(3)).tolist()}, "frame_2.png is a mirror image"),
    ({"T": "x"}, "a field of a frame is not what it should be"),
    ({"intrinsics_format": "pixels"}, "intrinsics_format = 'pixels'; ndc_isotropic and"),
    ({"focal_length": [0.0, 1.0]}, "a focal length is not positive"),
    ({"principal_point": [500.0, 0.0]}, "do not fit intrinsics_format"),
])  # fmt: skip
def test_a_wrong_sequence_of_co3d_has_its_error(tmp_path, world, changes, message):
    found = read_co3d(co3d(tmp_path, world, **changes))["12_34_56"]
    assert isinstance(found, ValueError)
    with pytest.raises(ValueError, match=message):
        raise found


def test_annotations_that_are_none_are_named(tmp_path, world):
    path = co3d(tmp_path, world)
    for content, message in (
        (b"x", "is not a file of frame annotations"),
        (gzip.compress(b"{}"), "it has a dict, not a list of frames"),
        (gzip.compress(b"[1]"), "is not a file of frame annotations"),
        (path.read_bytes()[:-30], "is not a file of frame annotations"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_co3d(path)


def test_wrong_annotations_of_spatialvid_are_named(tmp_path, world):
    def raises(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            read_spatialvid(tmp_path)
        spatialvid(tmp_path, world)

    spatialvid(tmp_path, world)
    np.save(tmp_path / "poses.npy", np.zeros((4, 12), np.float32))
    raises(r"poses.npy: float32 \(4, 12\); expected floating-point numbers \(N, 7\)")
    np.save(tmp_path / "poses.npy", np.zeros((4, 7), np.int64))
    raises(r"poses.npy: int64 \(4, 7\)")
    np.save(tmp_path / "poses.npy", np.zeros((4, 7), np.float32))
    raises("the quaternion of row 0 has the length 0")
    np.save(tmp_path / "poses.npy", np.array([{}]), allow_pickle=True)
    raises("poses.npy is not a NumPy array")
    np.save(tmp_path / "intrinsics.npy", np.ones((3, 4)))
    raises("poses.npy has 4 rows, intrinsics.npy 3")
    np.save(tmp_path / "intrinsics.npy", np.full((4, 4), 500.0))
    raises("look like pixels. intrinsics.npy has fx and cx divided by the width")
    (tmp_path / "indexes.txt").write_text("0 1\n1 2\n")
    raises("poses.npy has 4 rows, indexes.txt 2")
    (tmp_path / "indexes.txt").write_text("0 1\n1 2\n2 2\n3 9\n")
    raises("the numbers of the frames do not increase")
    (tmp_path / "indexes.txt").write_text("0\n1\n2\n3\n")
    raises("expected two numbers in each line")
    (tmp_path / "intrinsics.npy").unlink()
    raises("intrinsics.npy: no such file")
