"""Rotations in numpy: error of a matrix, nearest rotation, exponential, logarithm and interpolation."""

import numpy as np


def rotation_error(matrices: np.ndarray) -> np.ndarray:
    """The largest entry of |R R^T - I| of matrices `... 3 3`; at least 2 for reflections."""
    matrices = np.asarray(matrices, np.float64)
    error = np.abs(matrices @ np.swapaxes(matrices, -1, -2) - np.eye(3)).max(axis=(-2, -1))
    return np.where(np.linalg.det(matrices) > 0, error, np.maximum(error, 2.0))


def nearest(matrices: np.ndarray) -> np.ndarray:
    """The rotations nearest to 3x3 matrices in the Frobenius norm (Kabsch 1976)."""
    left, _, right = np.linalg.svd(np.asarray(matrices, np.float64))
    sign = np.ones((*left.shape[:-2], 3))
    sign[..., 2] = np.sign(np.linalg.det(left @ right))
    return (left * sign[..., None, :]) @ right


def exponential(vectors: np.ndarray) -> np.ndarray:
    """Rotations `... 3 3` from axis-angle vectors `... 3` in radians (Rodrigues)."""
    vectors = np.asarray(vectors, np.float64)
    angle = np.linalg.norm(vectors, axis=-1)[..., None, None]
    cross = cross_matrix(vectors)
    # sin(a)/a and (1 - cos a)/a^2 without division by zero.
    return np.eye(3) + np.sinc(angle / np.pi) * cross + 0.5 * np.sinc(angle / (2 * np.pi)) ** 2 * (cross @ cross)


def logarithm(rotation: np.ndarray) -> np.ndarray:
    """The axis-angle vector of one rotation (3, 3), of length 0 to pi."""
    rotation = np.asarray(rotation, np.float64)
    axis = (
        np.array([rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]])
        / 2
    )
    sine, cosine = np.linalg.norm(axis), (np.trace(rotation) - 1) / 2
    angle = np.arctan2(sine, cosine)
    if sine > 1e-7:
        return axis / sine * angle
    if cosine > 0:
        return axis
    # A rotation by pi: the axis is the largest column of R + I.
    columns = rotation + np.eye(3)
    largest = columns[:, np.argmax(np.diag(columns))]
    return largest / np.linalg.norm(largest) * angle


def interpolate(first: np.ndarray, last: np.ndarray, fractions: np.ndarray) -> np.ndarray:
    """Rotations (n, 3, 3) at fractions (n,) of the shortest rotation from `first` to `last`."""
    vector = logarithm(np.swapaxes(first, -1, -2) @ last)
    return first @ exponential(np.asarray(fractions, np.float64)[:, None] * vector)


def angle_between(first: np.ndarray, second: np.ndarray) -> np.ndarray | np.floating:
    """Angles in radians between rotations `... 3 3`."""
    cosine = (np.trace(np.swapaxes(first, -1, -2) @ second, axis1=-2, axis2=-1) - 1) / 2
    return np.arccos(np.clip(cosine, -1.0, 1.0))


def cross_matrix(vectors: np.ndarray) -> np.ndarray:
    """The skew-symmetric matrices `... 3 3` with [v]x w = v x w."""
    x, y, z = np.moveaxis(np.asarray(vectors), -1, 0)
    zero = np.zeros_like(x)
    return np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=-1).reshape(*x.shape, 3, 3)
