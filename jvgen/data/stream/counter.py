"""Counter-based random numbers and permutations: pure functions of integers, without state."""

import numpy as np

_ROUND_PAIRS = 3
_GOLDEN = 0x9E3779B97F4A7C15
_ODD = 0x9E3779B97F4A7  # small enough that a few multiples of it fit in 64 bits
_WORD = (1 << 64) - 1


def fold(*words: int) -> int:
    """64 bits that depend on every word and on their order. Python integers of any size and sign."""
    state = 0
    for word in words:
        state = _mix_integer((state * _GOLDEN + word + _GOLDEN) & _WORD)
    return state


def uniforms(count: int, *words: int) -> np.ndarray:
    """`count` float64 numbers in [0, 1), a function of the words; a smaller `count` gives a prefix of them.

    The SplitMix64 generator (Steele, Lea and Flood 2014), seeded with the folded words.
    """
    states = np.uint64(fold(*words)) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return (_mix(states) >> np.uint64(11)) * 2.0**-53


def permute(position: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """The image of each position under the pseudo-random permutation of 0..size-1 selected by `key`.

    A Feistel network on the smallest power of two of at least `size`, iterated until the value is below `size`
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"): fewer than two iterations on average and no
    table, so any element of a permutation of billions costs the same.

    Args:
      position: int64, 0 <= position < size.
      size: int64, at most 2**32.
      key: uint64; each element may select another permutation.
    """
    position, size, key = (np.array(a) for a in np.broadcast_arrays(position, size, key))
    assert np.all((position >= 0) & (position < size)) and np.all(size <= 2**32)
    # frexp gives the bit length of an integer below 2**53 exactly.
    bits = np.frexp((size - 1).astype(np.float64))[1]
    # A network of few bits reaches some permutations much more often than others: use at least 5 bits.
    bits = np.where(size == 1, 0, np.maximum(bits, 5)).astype(np.uint64)
    size, key = size.astype(np.uint64), key.astype(np.uint64)
    landed = _feistel(position.astype(np.uint64), bits, key)
    outside = np.flatnonzero(landed >= size)
    while outside.size:
        again = _feistel(landed[outside], bits[outside], key[outside])
        landed[outside] = again
        outside = outside[again >= size[outside]]
    return landed.astype(np.int64)


def fold_array(key: np.ndarray, word: np.ndarray) -> np.ndarray:
    """uint64 keys, each folded with a non-negative integer."""
    words = (np.asarray(word).astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    return _mix(_mix(np.asarray(key, np.uint64)) + words)


def _feistel(value: np.ndarray, bits: np.ndarray, key: np.ndarray) -> np.ndarray:
    low = (bits + np.uint64(1)) >> np.uint64(1)
    low_mask, high_mask = (np.uint64(1) << low) - np.uint64(1), (np.uint64(1) << (bits - low)) - np.uint64(1)
    high_part, low_part = value >> low, value & low_mask
    for pair in range(_ROUND_PAIRS):
        # Keys are already mixed: adding the round number is enough to make the rounds differ.
        high_part ^= _mix(key + np.uint64(2 * pair + 1) * np.uint64(_ODD) + low_part) & high_mask
        low_part ^= _mix(key + np.uint64(2 * pair + 2) * np.uint64(_ODD) + high_part) & low_mask
    return (high_part << low) | low_part


def _mix(value: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64: a bijection of 64 bits in which each input bit flips half of the output bits."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _mix_integer(value: int) -> int:
    """As `_mix`, of one Python integer: `fold` is called too often to build arrays for it."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _WORD
    return value ^ (value >> 31)
