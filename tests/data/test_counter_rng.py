"""The counter-based generator: the published sequence, the slow twin, and uniformity within derived bounds.

Guards: every training instance hangs on these bits; a changed constant would silently give other data.
"""

import numpy as np
import pytest

from largebatch.data.counter_rng import below, chance, draw, fold_key, mix64, mix64_int

# The first outputs of SplitMix64 from the state 1234567, as printed by its authors' C program.
PUBLISHED = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]


def test_draw_gives_the_published_sequence() -> None:
    assert draw(1234567, np.arange(5)).tolist() == PUBLISHED
    assert [int(draw(1234567, counter)[0]) for counter in range(5)] == PUBLISHED


def test_arrays_and_integers_agree() -> None:
    words = np.array([0, 1, 2**32, 2**63, 2**64 - 1, *PUBLISHED], dtype=np.uint64)
    assert mix64(words).tolist() == [mix64_int(word) for word in words.tolist()]


def test_mix64_leaves_its_input_alone() -> None:
    words = np.arange(5, dtype=np.uint64)
    mix64(words)
    assert words.tolist() == [0, 1, 2, 3, 4]


def test_fold_key_depends_on_every_word_their_order_and_number() -> None:
    keys = [fold_key(), fold_key(0), fold_key(0, 0), fold_key(1, 0), fold_key(0, 1), fold_key(-1), fold_key(2**64 - 2)]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("bound", [1, 2, 3, 10, 1000])
def test_below_is_uniform(bound: int) -> None:
    """Each value's count is binomial(n, 1/bound): six standard deviations are passed once in 5e8 counts."""
    n = 200_000
    counts = np.bincount(below(draw(7, np.arange(n)), bound), minlength=bound)
    assert len(counts) == bound
    assert np.abs(counts - n / bound).max() <= 6 * np.sqrt(n / bound * (1 - 1 / bound))


def test_below_reaches_both_ends() -> None:
    extremes = np.array([0, 2**64 - 1], dtype=np.uint64)
    assert below(extremes, 2**31).tolist() == [0, 2**31 - 1]
    assert below(extremes, np.array([5, 7])).tolist() == [0, 6]


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.8, 1.0])
def test_chance_has_its_probability(probability: float) -> None:
    n = 200_000
    num = int(chance(draw(3, np.arange(n)), probability).sum())
    assert abs(num - n * probability) <= 6 * np.sqrt(n * probability * (1 - probability))


def test_neighbouring_keys_and_counters_are_uncorrelated() -> None:
    """The mean of n products of centred uniforms has standard deviation 1 / (12 sqrt(n)); six of them."""
    n = 100_000
    keys = draw(1, np.arange(n))
    first, second = (draw(keys, counter) / 2.0**64 - 0.5 for counter in (0, 1))
    for a, b in ((first, second), (first[1:], first[:-1]), (second[1:], first[:-1])):
        assert abs((a * b).mean()) < 6 / (12 * np.sqrt(len(a)))
