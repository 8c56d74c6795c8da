"""The shuffle is a permutation, looks random, and a cursor cuts the stream anywhere without a trace.

Guards: samples lost, repeated, or given to two ranks; an epoch whose order repeats the last one's; shuffles that
leave neighbours together.
"""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from largebatch.data import SampleStream, epoch_order
from largebatch.errors import UserError


@pytest.mark.parametrize("num", [1, 2, 3, 4, 5, 17, 4096, 4097, 65536, 65537, 300_000])
def test_an_order_is_a_permutation(num: int) -> None:
    order = epoch_order(1, 0, num)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(num))


def test_no_instances() -> None:
    assert epoch_order(1, 0, 0).shape == (0,)


def test_any_part_is_that_part_of_the_whole() -> None:
    for num in (1001, 5001):
        whole = epoch_order(3, 7, num)
        for start, stop in ((0, 0), (0, 1), (500, 777), (1000, 1001), (0, num)):
            assert np.array_equal(epoch_order(3, 7, num, start, stop), whole[start:stop])
    with pytest.raises(ValueError, match="positions 5 to 1002"):
        epoch_order(3, 7, 1001, 5, 1002)


def test_a_batch_of_a_huge_epoch_is_cheap() -> None:
    """10**12 instances would not fit into memory: nothing of that size may be made."""
    part = epoch_order(0, 0, 10**12, 10**11, 10**11 + 1000)
    assert len(np.unique(part)) == 1000
    assert part.min() >= 0
    assert part.max() < 10**12
    # The mean of 1,000 uniforms: standard deviation 1e12 / sqrt(12,000).
    assert abs(part.mean() - 5e11) < 6 * 1e12 / math.sqrt(12_000)


@pytest.mark.parametrize("num", [2, 3, 4, 5])
def test_all_permutations_of_few_are_alike(num: int) -> None:
    """Chi-squared over the num! permutations of 6,000 seeds, within six standard deviations of its mean."""
    seeds = 6_000
    counts: dict[tuple[int, ...], int] = dict.fromkeys(itertools.permutations(range(num)), 0)
    for seed in range(seeds):
        counts[tuple(epoch_order(seed, 0, num).tolist())] += 1
    expected = seeds / len(counts)
    chi2 = sum((count - expected) ** 2 / expected for count in counts.values())
    degrees = len(counts) - 1
    assert abs(chi2 - degrees) < 6 * math.sqrt(2 * degrees)


def test_a_large_order_has_the_fixed_points_runs_and_correlation_of_a_random_one() -> None:
    num = 200_000
    orders = [epoch_order(seed, epoch, num) for seed in (0, 1) for epoch in (0, 1)]
    position = np.arange(num)
    for order in orders:
        # Neighbours that stay neighbours, and fixed points: Poisson with mean 2 and 1; above 20 once in 1e13.
        assert (np.abs(np.diff(order)) == 1).sum() <= 20
        assert (order == position).sum() <= 20
        # Ascents: mean (n - 1) / 2, variance (n + 1) / 12.
        assert abs((np.diff(order) > 0).sum() - (num - 1) / 2) < 6 * math.sqrt((num + 1) / 12)
        assert abs(np.corrcoef(order, position)[0, 1]) < 6 / math.sqrt(num)
    for one, other in itertools.combinations(orders, 2):
        assert (one == other).sum() <= 20
        assert abs(np.corrcoef(one, other)[0, 1]) < 6 / math.sqrt(num)


def test_the_order_is_pinned() -> None:
    """A run resumed with a later version must see the same samples."""
    assert epoch_order(1, 2, 10).tolist() == [0, 8, 2, 4, 6, 1, 5, 9, 7, 3]
    assert epoch_order(1, 2, 10**8, 0, 5).tolist() == [96675001, 98090204, 66400064, 97876057, 97287286]


def sizes(epoch: int) -> int:
    return 100 + 7 * (epoch % 3)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 250), min_size=1, max_size=12))
def test_cutting_the_stream_changes_nothing(counts: list[int]) -> None:
    """However it is cut into batches, the stream is epoch after epoch, each in its order, each sample once."""
    stream = SampleStream(sizes, seed=9)
    cursor, taken = None, []
    for count in counts:
        pieces, cursor = stream.take(cursor, count)
        batch = [(epoch, index) for epoch, indices in pieces for index in indices.tolist()]
        assert len(batch) == count
        taken += batch
    expected = itertools.chain.from_iterable(
        ((epoch, index) for index in epoch_order(9, epoch, sizes(epoch)).tolist()) for epoch in itertools.count()
    )
    assert taken == list(itertools.islice(expected, len(taken)))
    assert cursor is not None
    assert all(isinstance(value, int) for value in cursor.values())
    assert cursor["position"] < sizes(cursor["epoch"])


def test_ranks_share_a_batch_by_slicing() -> None:
    """The samples of a step are the same whatever the number of ranks, and no two ranks share one."""
    stream = SampleStream(sizes, seed=0)
    pieces, _ = stream.take({"epoch": 0, "position": 90}, 64)
    batch = [(epoch, index) for epoch, indices in pieces for index in indices.tolist()]
    for world in (1, 2, 4, 8):
        parts = [batch[rank * 64 // world : (rank + 1) * 64 // world] for rank in range(world)]
        assert sorted(itertools.chain.from_iterable(parts)) == sorted(batch)
    assert len(set(batch)) == 64


def test_an_empty_epoch_is_an_error_not_an_endless_loop() -> None:
    with pytest.raises(UserError, match="epoch 0 holds no training instance"):
        SampleStream(lambda epoch: 0, seed=0).take(None, 1)


def test_a_foreign_cursor_is_refused() -> None:
    with pytest.raises(UserError, match="position 101 lies beyond epoch 0's 100"):
        SampleStream(sizes, seed=0).take({"epoch": 0, "position": 101}, 1)
