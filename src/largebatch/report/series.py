"""Arithmetic on recorded series: smoothing, thinning, quantiles."""

import math
from collections.abc import Iterable, Sequence

NAN = math.nan


def finite(values: Iterable[float]) -> list[float]:
    return [v for v in values if math.isfinite(v)]


def isolated(values: Sequence[float]) -> list[int]:
    """Where a finite value has no finite neighbour, so that a line through the values does not show it."""
    known = [False, *map(math.isfinite, values), False]
    return [i for i in range(len(values)) if known[i + 1] and not (known[i] or known[i + 2])]


def quantile(values: Iterable[float], q: float) -> float:
    """The quantile of the finite values, linear between two of them; NaN when there are none."""
    ordered = sorted(finite(values))
    if not ordered:
        return NAN
    place = q * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low + place % 1 * (high - low)


def window(num_steps: int) -> int:
    """How many steps to average over: a fortieth of the series, odd; 1 (no smoothing) below 80 steps."""
    return max(1, num_steps // 40) // 2 * 2 + 1 if num_steps >= 80 else 1


def smooth(values: Sequence[float], stages: Sequence[str], width: int) -> list[float]:
    """Centred mean over `width` finite values, never across a stage boundary; NaN stays where it is."""
    if width == 1:
        return [v if math.isfinite(v) else NAN for v in values]
    out: list[float] = []
    start = 0
    while start < len(values):
        stop = start
        while stop < len(values) and stages[stop] == stages[start]:
            stop += 1
        out += _smooth_stage(values[start:stop], width // 2, steep=start == 0)
        start = stop
    return out


def _smooth_stage(values: Sequence[float], reach: int, *, steep: bool) -> list[float]:
    # At the ends the window is one-sided, but at the start of training it shrinks to stay centred: curves are steep
    # there, and a one-sided mean would bend them.
    out = []
    for i, value in enumerate(values):
        half = min(reach, i) if steep else reach
        near = finite(values[max(0, i - half) : i + half + 1])
        out.append(math.fsum(near) / len(near) if math.isfinite(value) else NAN)
    return out


def thin(xs: Sequence[float], ys: Sequence[float], bins: int) -> tuple[list[float], list[float]]:
    """Keep the lowest and the highest point of each of `bins` stretches: the same picture at a fraction of the size."""
    if len(xs) <= 2 * bins:
        return list(xs), list(ys)
    keep: set[int] = {0, len(xs) - 1}
    for b in range(bins):
        stretch = range(b * len(xs) // bins, (b + 1) * len(xs) // bins)
        known = [i for i in stretch if math.isfinite(ys[i])]
        keep.update((min(known, key=ys.__getitem__), max(known, key=ys.__getitem__)) if known else (stretch[0],))
    order = sorted(keep)
    return [xs[i] for i in order], [ys[i] for i in order]
