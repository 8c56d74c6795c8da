"""Arithmetic behind the curves: the running mean must neither mix stages nor hide NaN, and thinning keep spikes."""

import math
import statistics

import numpy as np
import pytest

from largebatch.report import series

NAN = math.nan


def test_the_mean_is_centred_and_exact() -> None:
    """By hand. A straight line is a fixed point of a centred mean wherever the window is centred; the start shrinks
    to stay so, the end is one-sided: the last value is the mean of the last two."""
    line = [float(i) for i in range(10)]
    assert series.smooth(line, ["a"] * 10, 3) == [*line[:9], 8.5]
    assert series.smooth([0, 3, 0, 3, 0, 3], ["a"] * 6, 3) == [0, 1, 2, 1, 2, 1.5]


def test_the_mean_does_not_cross_a_stage() -> None:
    values, stages = [1.0] * 5 + [9.0] * 5, ["a"] * 5 + ["b"] * 5
    assert series.smooth(values, stages, 5) == values
    assert series.smooth(values, ["a"] * 10, 5) != values


def test_the_mean_leaves_gaps_where_values_are_not_finite() -> None:
    smoothed = series.smooth([1, 1, NAN, math.inf, 4, 4], ["a"] * 6, 3)
    assert [math.isnan(v) for v in smoothed] == [False, False, True, True, False, False]
    assert smoothed[1] == 1
    assert smoothed[4] == 4


@pytest.mark.parametrize(("num_steps", "width"), [(1, 1), (79, 1), (80, 3), (500, 13), (10_000, 251)])
def test_the_window_is_a_fortieth_and_odd(num_steps: int, width: int) -> None:
    assert series.window(num_steps) == width


def test_thinning_keeps_the_ends_and_the_extremes() -> None:
    ys = [math.sin(i / 50) for i in range(10_000)]
    ys[1234], ys[8765] = 100.0, -100.0
    xs, thinned = series.thin(range(10_000), ys, 100)
    assert len(xs) <= 202
    assert (xs[0], xs[-1]) == (0, 9999)
    assert {1234, 8765} < set(xs)
    assert xs == sorted(xs)
    assert all(ys[x] == y for x, y in zip(xs, thinned, strict=True))


def test_thinning_leaves_short_series_alone() -> None:
    assert series.thin([1, 2], [3, NAN], 1)[0] == [1, 2]


def test_isolated_values_are_those_no_line_shows() -> None:
    assert series.isolated([1, NAN, 2, 3, math.inf, 4]) == [0, 5]
    assert series.isolated([1]) == [0]
    assert series.isolated([NAN]) == series.isolated([]) == series.isolated([1, 2]) == []


def test_quantiles_ignore_what_is_not_finite() -> None:
    values = [NAN, 3, 1, math.inf, 2]
    assert [series.quantile(values, q) for q in (0, 0.5, 1)] == [1, 2, 3]
    assert math.isnan(series.quantile([NAN], 0.5))


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_quantiles_lie_between_the_values_as_numpy_s_do(count: int) -> None:
    """The nearest rank made the median of two values one of them."""
    values = np.random.default_rng(count).lognormal(size=count).tolist()
    assert series.quantile(values, 0.5) == pytest.approx(statistics.median(values), rel=1e-15)
    for q in (0, 0.01, 0.2, 0.98, 1):
        assert series.quantile(values, q) == pytest.approx(np.quantile(values, q), rel=1e-15)
