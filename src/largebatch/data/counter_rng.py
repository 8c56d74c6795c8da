"""Random numbers as pure functions of a key and a counter, on whole arrays at once.

The generator is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014):
the n-th number of the sequence with key k is ``mix64(k + (n + 1) * GOLDEN)``. It has no state to advance, so the
numbers of one training instance do not depend on which other instances were made before it or beside it, nor on the
version of numpy.
"""

import math

import numpy as np
from numpy.typing import NDArray

GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1

U64 = NDArray[np.uint64]


def mix64(x: U64) -> U64:
    """Scramble 64-bit words one to one (SplitMix64's finaliser, Stafford's variant 13)."""
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(_FIRST)
    x ^= x >> np.uint64(27)
    x *= np.uint64(_SECOND)
    x ^= x >> np.uint64(31)
    return x


def mix64_int(x: int) -> int:
    """`mix64` of one Python integer."""
    x &= _MASK
    x = ((x ^ (x >> 30)) * _FIRST) & _MASK
    x = ((x ^ (x >> 27)) * _SECOND) & _MASK
    return x ^ (x >> 31)


def fold_key(*words: int) -> int:
    """One 64-bit key from several integers; their order and number matter."""
    key = len(words)
    for word in words:
        key = mix64_int(mix64_int(key + GOLDEN) ^ (word & _MASK))
    return key


def draw(key: int | U64, counter: int | NDArray[np.integer]) -> U64:
    """The `counter`-th 64 random bits of the sequence `key`; both broadcast against each other."""
    if isinstance(key, int):
        key = np.full((1,), key, dtype=np.uint64)
    if isinstance(counter, int):
        return mix64(key + np.uint64(((counter + 1) * GOLDEN) & _MASK))
    return mix64(key + (counter.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN))


def below(bits: U64, bound: int | NDArray[np.integer]) -> NDArray[np.int64]:
    """Integers uniform in [0, bound), bound < 2**32: the high half of 32 bits times bound.

    No value's probability is off by more than 2**-32.
    """
    return (((bits >> np.uint64(32)) * np.asarray(bound).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


def chance(bits: U64, probability: float) -> NDArray[np.bool_]:
    """True with the given probability: the top 53 bits, as a number in [0, 1), lie under it."""
    return (bits >> np.uint64(11)) < np.uint64(math.ceil(probability * 2.0**53))
