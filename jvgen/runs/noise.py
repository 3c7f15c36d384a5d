"""The noise that clips start from, read from a file."""

import numpy as np

from jvgen.storage import Path, local_copy, reading


def read_noise(path: Path, shape: tuple[int, int, int, int], clips: int) -> np.ndarray:
    """Noise for each clip, float32 `N F H W C`.

    Args:
      path: `.npy` with latents of one clip (for all) or of each clip in order: `N F H W C` or `F H W C`, or with
        channels behind the frames, as diffusers' CogVideoX pipelines have their `latents` (`N F C H W`). Where both
        fit, channels are last.
      shape: frames, height, width and channels of the latents that are sampled.
      clips: how many are made.

    Raises:
      ValueError: no such file, not an array of numbers, or another shape.
    """
    if not path.is_file():
        raise ValueError(f"--noise {path}: no such file; expected an array saved by numpy.save.")
    copy = local_copy(path)
    with reading(copy, "(--noise) is not an array of numbers saved by numpy.save", "Give another file."):
        # Opened here: NumPy leaves an archive open that it cannot read.
        with copy.open("rb") as stream:
            noise = np.load(stream, allow_pickle=False)
    if not isinstance(noise, np.ndarray):
        raise ValueError(f"--noise {path}: is an archive of arrays (.npz); expected one array saved by numpy.save.")
    if not np.issubdtype(noise.dtype, np.floating):
        raise ValueError(f"--noise {path}: holds {noise.dtype}; expected floats, normally distributed.")
    frames, height, width, channels = shape
    given = noise.shape
    if noise.ndim == 4:
        noise = noise[None]
    if noise.shape[1:] == (frames, channels, height, width) != shape:
        noise = noise.transpose(0, 1, 3, 4, 2)
    if noise.shape[1:] != shape or len(noise) not in (1, clips):
        raise ValueError(
            f"--noise {path}: has the shape {given}; {clips} clips of {frames} latent frames of {height}x{width} with "
            f"{channels} channels need {(clips, *shape)} or {(clips, frames, channels, height, width)}, or one clip's."
        )
    if not np.isfinite(noise).all():
        raise ValueError(f"--noise {path}: has numbers that are not finite.")
    return np.broadcast_to(noise.astype(np.float32), (clips, *shape))
