"""Finds hashes that differ in few bits among millions: near ones agree in two of many bands of bits."""

import itertools

import numpy as np

# Clips are near-duplicates if their hashes differ in at most this many bits, as re-encoded and resized copies do.
MAX_BITS = 11
_BANDS = MAX_BITS + 2  # of which two are equal in hashes that differ in so many bits
_NEIGHBORS = 256  # that each hash is compared with, of those that agree in the same two bands
_CHUNK = 1 << 20  # rows whose bits are unpacked at a time


def near_duplicates(hashes: np.ndarray, readable: np.ndarray) -> np.ndarray:
    """For every record the first one of which it is a near-duplicate, -1 for none; int64 (n,).

    Records of a chain of near-duplicates all have the first of the chain.

    Args:
      hashes: uint64 (n, frames).
      readable: bool (n,); the others have no duplicates.
    """
    rows = np.flatnonzero(readable)
    # Equal ones first: a stable sort, so that the earliest of them leads.
    order = rows[np.lexsort(hashes[rows].T)]
    begins = np.ones(len(order), bool)
    begins[1:] = np.any(hashes[order[1:]] != hashes[order[:-1]], axis=1)
    leaders = order[begins]
    place = np.empty(len(leaders), np.int64)
    place[np.argsort(leaders)] = np.arange(len(leaders))
    earliest = np.sort(leaders)
    parents = _joined(hashes[earliest])
    first = np.full(len(hashes), -1)
    first[order] = earliest[parents[place[np.cumsum(begins) - 1]]]
    return np.where(first == np.arange(len(hashes)), -1, first)


def _joined(hashes: np.ndarray) -> np.ndarray:
    """The first hash of the chain of each, int64 (n,)."""
    parents, bands = np.arange(len(hashes)), _bands(hashes)
    for one, other in itertools.combinations(bands, 2):
        keys = one.astype(np.uint32) << 16 | other
        order = np.argsort(keys)
        keys = keys[order]
        places = np.arange(len(keys))
        for distance in range(1, _NEIGHBORS + 1):
            places = places[: np.searchsorted(places, len(keys) - distance)]
            places = places[keys[places] == keys[places + distance]]
            if not len(places):
                break
            left, right = order[places], order[places + distance]
            near = np.bitwise_count(hashes[left] ^ hashes[right]).sum(1) <= MAX_BITS
            _join(parents, left[near], right[near])
    return _roots(parents, np.arange(len(parents)))


def _bands(hashes: np.ndarray) -> np.ndarray:
    """The bits of each hash in groups, uint16 (bands, n).

    They are shuffled: a frame that is black in many clips, or the same one three times, would make bands equal.
    """
    bits = 64 * hashes.shape[1]
    groups = np.array_split(np.random.default_rng(0).permutation(bits), _BANDS)
    bands = np.zeros((_BANDS, len(hashes)), np.uint16)
    for start in range(0, len(hashes), _CHUNK):
        chunk = np.ascontiguousarray(hashes[start : start + _CHUNK])
        unpacked = np.unpackbits(chunk.view(np.uint8), axis=1)
        for band, group in zip(bands, groups, strict=True):
            for bit in group:
                band[start : start + _CHUNK] = band[start : start + _CHUNK] << 1 | unpacked[:, bit]
    return bands


def _join(parents: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Join pairs: the smaller root becomes the parent of the other."""
    while len(left):
        left, right = _roots(parents, left), _roots(parents, right)
        apart = left != right
        left, right = left[apart], right[apart]
        np.minimum.at(parents, np.maximum(left, right), np.minimum(left, right))


def _roots(parents: np.ndarray, members: np.ndarray) -> np.ndarray:
    while True:
        above = parents[members]
        if np.array_equal(above, members):
            return members
        members = above
