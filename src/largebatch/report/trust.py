"""Trust-ratio figures: layers over steps, and the layers at a few steps (Figures 9-14 of the LAMB paper)."""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from largebatch.report import series, style
from largebatch.report.axes import count_ticks, log_ticks, stage_name
from largebatch.report.layers import Group, arrange
from largebatch.report.read import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINE_IN = 0.125  # height of a row that has a name of its own
BAND_IN = 5.5  # most height of all rows that share one
TALLEST_IN = 8.0


def trust_heat_map(run: Run, name: str) -> style.Picture:
    """Every adapted layer's trust ratio over training, as colour on a logarithmic scale."""
    from matplotlib.colors import LogNorm

    order, groups = arrange(list(run.ratios.rows))
    rows = [[_positive(v) for v in run.ratios.rows[layer]] for layer in order]
    low, high = _limits([v for row in rows for v in row])
    edges = _row_edges(groups)
    figure = style.new_figure(True, edges[-1] + 0.6)
    ax = figure.add_subplot()
    norm = LogNorm(low, high)
    mesh = ax.pcolormesh(_step_edges(run.ratios.steps), edges, rows, cmap="viridis", norm=norm, rasterized=True)
    extend = _beyond(rows, low, high)
    bar = figure.colorbar(mesh, ax=ax, pad=0.015, fraction=0.04, aspect=30, extend=extend, extendfrac=0.02)
    bar.set_label("Trust ratio")
    bar.outline.set_visible(False)
    log_ticks(bar.ax.yaxis, low, high)
    _name_rows(ax, groups, edges)
    ax.grid(visible=False)
    ax.spines["left"].set_visible(False)
    for place, _, after in run.boundaries:
        ax.axvline(place, color=style.PAPER, linewidth=1.2)
        stage_name(ax, f"{after} →", place)
    ax.set_xlabel("Optimizer step")
    count_ticks(ax.xaxis)
    caption = f"Trust ratio of {_count(order)} over training, logarithmic colour scale."
    return style.picture(figure, name, caption + _sorting(order, groups), wide=True)


def trust_bars(run: Run, name: str) -> style.Picture:
    """Every adapted layer's trust ratio at up to four steps, side by side."""
    order, groups = arrange(list(run.ratios.rows))
    last = len(run.ratios.steps) - 1
    picked = sorted({0, round(last / 3), round(2 * last / 3), last})
    columns = [[_positive(run.ratios.rows[layer][i]) for layer in order] for i in picked]
    known = series.finite(v for column in columns for v in column)
    low, high = (min(known) / 1.5, max(known) * 1.2) if known else (0.1, 1.0)
    edges = _row_edges(groups)
    figure = style.new_figure(True, edges[-1] + 0.7)
    panels = figure.subplots(1, len(picked), sharey=True, sharex=True, squeeze=False)[0]
    for ax, i, column in zip(panels, picked, columns, strict=True):
        ax.set_xscale("log")
        for group in groups:
            _draw_bars(ax, column[group.start : group.stop], edges[group.start : group.stop + 1], low)
        if low < 1 < high:
            ax.axvline(1, color=style.INK, linewidth=0.6, linestyle=(0, (5, 2)))
        ax.set_xlim(low, high)
        ax.grid(visible=False, axis="y")
        ax.grid(visible=True, axis="x")
        log_ticks(ax.xaxis, low, high)
        ax.set_title(f"step {run.ratios.steps[i]:,}", color=style.MUTED, fontsize=6.5)
        _name_rows(ax, groups, edges)
    figure.supxlabel("Trust ratio", fontsize=7)
    when = f"{len(picked)} steps" if len(picked) > 1 else f"step {run.ratios.steps[0]:,}"
    caption = f"Trust ratio of {_count(order)} at {when}, logarithmic scale."
    return style.picture(figure, name, caption + _sorting(order, groups), wide=True)


def _draw_bars(ax: "Axes", values: Sequence[float], edges: Sequence[float], low: float) -> None:
    """A bar for a layer by itself, a stepped profile for the depths of one kind."""
    colour = style.SERIES[0]
    if len(values) == 1:
        middle, height = (edges[0] + edges[1]) / 2, 0.66 * (edges[1] - edges[0])
        ax.barh(middle, values[0] - low, height, left=low, color=colour, alpha=0.8, linewidth=0)
        return
    inset = 0.04 * (edges[-1] - edges[0])  # so that neighbouring kinds do not touch
    scaled = [edges[0] + inset + (e - edges[0]) * (1 - 2 * inset / (edges[-1] - edges[0])) for e in edges]
    shape: dict[str, Any] = {"baseline": low, "orientation": "horizontal"}
    ax.stairs([v if math.isfinite(v) else low for v in values], scaled, **shape, fill=True, color=colour, alpha=0.8)


def _positive(value: float) -> float:
    return value if value > 0 and math.isfinite(value) else series.NAN


def _count(order: Sequence[str]) -> str:
    return f"the {len(order)} adapted layers" if len(order) > 1 else "the one adapted layer"


def _sorting(order: Sequence[str], groups: Sequence[Group]) -> str:
    return "" if len(groups) == len(order) else " Rows are sorted by kind, then by depth, the first block on top."


def _row_edges(groups: Sequence[Group]) -> list[float]:
    """Borders of the rows, in inches from the top: room for a line of text where a row has a name of its own."""
    shared = sum(g.stop - g.start for g in groups if g.stop - g.start > 1)
    row_in = min(0.05, BAND_IN / shared) if shared else 0.0
    heights = []
    for group in groups:
        size = group.stop - group.start
        heights += [max(LINE_IN / size, row_in if size > 1 else LINE_IN)] * size
    scale = min(1.0, TALLEST_IN / sum(heights))
    return [0.0, *accumulate(height * scale for height in heights)]


def _name_rows(ax: "Axes", groups: Sequence[Group], edges: Sequence[float]) -> None:
    """A label for each band of rows; where hundreds of kinds leave no room, for as many as fit."""
    ax.set_ylim(edges[-1], 0)
    ax.tick_params(axis="y", length=0)
    positions: list[float] = []
    labels = []
    for group in groups:
        middle = (edges[group.start] + edges[group.stop]) / 2
        if not positions or middle - positions[-1] >= 0.75 * LINE_IN:
            positions.append(middle)
            labels.append(group.label)
        if len(groups) < len(edges) - 1 and group.start:
            ax.axhline(edges[group.start], color=style.PAPER, linewidth=0.6)
    ax.set_yticks(positions, labels, fontsize=6)


def _step_edges(steps: Sequence[int]) -> list[float]:
    """Column borders halfway between the recorded steps."""
    middles = [(a + b) / 2 for a, b in pairwise(steps)]
    before, after = (middles[0], middles[-1]) if middles else (steps[0] + 0.5, steps[0] - 0.5)
    return [max(0.0, 2 * steps[0] - before), *middles, 2 * steps[-1] - after]


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """The middle 98% of the ratios: a zero-initialised bias must not use up the scale."""
    low, high = series.quantile(values, 0.01), series.quantile(values, 0.99)
    if not math.isfinite(low):
        return 0.1, 1.0
    return (low, high) if high > 1.05 * low else (low / 1.5, high * 1.5)


def _beyond(rows: Sequence[Sequence[float]], low: float, high: float) -> str:
    under, over = any(v < low for row in rows for v in row), any(v > high for row in rows for v in row)
    return {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[under, over]
