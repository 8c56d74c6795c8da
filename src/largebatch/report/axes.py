"""What the figures over training share: how a run is drawn, ranges, stage boundaries, legends."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from largebatch.report import series, style
from largebatch.report.quantities import Quantity
from largebatch.report.read import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

MOST_NOISY = 3  # runs in one figure whose single steps are drawn; the noise of more hides the curves
LEGEND_ROWS = 2  # that a figure's height allows for; more make it taller
ROW_IN = 0.147  # height of a legend's row, measured


@dataclass(frozen=True)
class XAxis:
    """What a curve is drawn over: a recorded column, in units of `unit` of it."""

    column: str
    label: str
    unit: float = 1.0

    def values(self, run: Run) -> list[float]:
        return [value / self.unit for value in run.steps.get(self.column, [])]

    def at(self, run: Run, step: int) -> float:
        """Where the run stood after `step` steps."""
        if self is STEP:
            return step
        i = bisect_right(run.steps["step"], step)
        return run.steps[self.column][i - 1] / self.unit if i else 0.0


STEP = XAxis("step", "Optimizer step")
SAMPLES = XAxis("samples", "Samples seen")


def training_time(runs: Sequence[Run]) -> XAxis:
    """Time in a unit that suits the longest run."""
    longest_s = max((max(series.finite(run.steps.get("time_s", [])), default=0.0) for run in runs), default=0.0)
    unit, name = (1.0, "s") if longest_s < 200 else (60.0, "min") if longest_s < 12000 else (3600.0, "h")
    return XAxis("time_s", f"Training time ({name})", unit)


def look(i: int) -> dict[str, Any]:
    """Colour and dashes of the i-th run."""
    return {"color": style.SERIES[i % 6], "linestyle": style.DASHES[i // 6 % 3]}


def run_label(runs: Sequence[Run], i: int) -> str:
    """What the legend calls the i-th run."""
    return style.legend_labels([run.name for run in runs])[i]


def draw_line(ax: "Axes", xs: Sequence[float], ys: Sequence[float], i: int, bins: int, label: str | None) -> None:
    """Draw a line of run i, with points where single values stand between gaps."""
    xs, ys = series.thin(xs, ys, bins)
    ax.plot(xs, ys, **look(i), linewidth=1.2, label=label)
    alone = series.isolated(ys)
    if alone:
        ax.plot([xs[k] for k in alone], [ys[k] for k in alone], "o", color=look(i)["color"], markersize=3)


def draw_run(
    ax: "Axes", runs: Sequence[Run], i: int, ys: Sequence[float], *, x: XAxis = STEP
) -> tuple[list[float], int]:
    """Draw run i: every step thin, the running mean thick. Returns the mean, and how many steps it spans."""
    run, wide = runs[i], ax.get_figure().get_figwidth() > style.COLUMN_IN  # type: ignore[union-attr]
    xs, bins = x.values(run), 700 if wide else 350
    width = series.window(len(ys))
    mean = series.smooth(ys, run.step_stages, width)
    if width > 1 and len(runs) <= MOST_NOISY:
        known = [v if math.isfinite(v) else series.NAN for v in ys]
        thin_label = "each step" if len(runs) == 1 else None
        ax.plot(*series.thin(xs, known, bins), color=look(i)["color"], linewidth=0.5, alpha=0.32, label=thin_label)
    label = run_label(runs, i) if len(runs) > 1 else f"mean of {width} steps" if width > 1 else "training"
    draw_line(ax, xs, mean, i, bins, label)
    if not _same_stages(runs):  # one bar across each curve in place of lines across the figure
        for position, _, _ in run.boundaries:
            k = bisect_right(run.steps["step"], position)
            ax.plot(xs[k], mean[k], marker="|", markersize=8, markeredgewidth=1.2, color=look(i)["color"])
    return mean, width


def mark_divergence(ax: "Axes", xs: Sequence[float], mean: Sequence[float], i: int) -> None:
    """A cross where a curve ends in values that are not finite."""
    if not mean or math.isfinite(mean[-1]) or not series.finite(mean):
        return
    last = max(k for k, v in enumerate(mean) if math.isfinite(v))
    ax.plot(xs[last], mean[last], marker="x", color=look(i)["color"], markersize=5, markeredgewidth=1.4, zorder=4)
    note(ax, "not finite from here", xs[last], mean[last], (5, 0), va="center")


def name_without_curve(ax: "Axes", runs: Sequence[Run], i: int) -> None:
    """A legend entry for a run of which no step is finite."""
    name = run_label(runs, i) if len(runs) > 1 else "training"
    ax.plot([], [], **look(i), linewidth=1.2, label=f"{name} (not finite)")


def horizontal(ax: "Axes", value: float, text: str) -> None:
    """A dashed line across the figure, labelled at its right end."""
    ax.axhline(value, color=style.INK, linewidth=0.8, linestyle=(0, (5, 2)))
    note(ax, text, 1, value, (0, 2.6), ("axes fraction", "data"), ha="right")


def note(
    ax: "Axes", text: str, x: float, y: float, offset: tuple[float, float], where: Any = "data", **how: Any
) -> None:
    """Small text `offset` points from (x, y), readable over lines."""
    box = {"facecolor": style.PAPER, "edgecolor": "none", "alpha": 0.8, "pad": 0.4}
    ax.annotate(text, (x, y), offset, where, "offset points", size=6, bbox=box, **how)


def set_range(ax: "Axes", shown: Sequence[float], what: Quantity) -> None:
    """A range that shows the running mean and the evaluations; noise and spikes of single steps may leave it."""
    values = series.finite(shown)
    if not values:
        return
    low, high = min(values), max(values)
    # BERT's loss falls eightfold, a classifier's or a diverging one's changes by orders of magnitude.
    if what.lower_is_better and low > 0 and high > 12 * low:
        ax.set_yscale("log")
        log_range(ax.yaxis, values)
        return
    if what.unit == "%":
        typical = series.quantile(values, 0.2)
        low = typical - (high - typical) if typical > 0.8 * high else 0.0
    margin = 0.06 * ((high - low) or 1.0)
    ax.set_ylim(low - margin if low else 0.0, high + margin)


def log_range(axis: "Axis", values: Sequence[float]) -> None:
    """A logarithmic axis over the positive values."""
    positive = [v for v in series.finite(values) if v > 0]
    if positive:
        low, high = min(positive) / 1.3, max(positive) * 1.3
        axis.axes.set_ylim(low, high)
        log_ticks(axis, low, high)


def log_ticks(axis: "Axis", low: float, high: float) -> None:
    """Plain numbers on a logarithmic axis, with some between the powers of ten where it is short."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    span = math.log10(high / low)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 1.6 else (1, 3) if span < 2.4 else (1,), numticks=12))
    axis.set_major_formatter(
        FuncFormatter(lambda v, _: f"{v:g}" if 1e-4 < v < 1e5 else f"10{style.superscript(round(math.log10(v)))}")
    )
    axis.set_minor_formatter(NullFormatter())


def finish(figure: "Figure", ax: "Axes", runs: Sequence[Run], label: str, x: XAxis = STEP) -> None:
    """Axis labels, stages, and the legend above, for which a figure of many runs becomes taller."""
    ax.set_ylabel(label)
    ax.set_xlabel(x.label)
    ends = [x.at(run, run.num_steps) for run in runs]
    ax.set_xlim(0, max(1.0, max(ends)) * 1.01)
    count_ticks(ax.xaxis, short=x is SAMPLES)
    if x is STEP and _same_stages(runs):
        _mark_stages(ax, runs[0])
    handles, labels = ax.get_legend_handles_labels()
    if len(handles) > 1:
        space_in, entries_in = figure.get_figwidth(), [0.42 + 0.052 * len(text) for text in labels]
        most = len(labels) if sum(entries_in) < space_in else max(1, int(space_in / max(entries_in)))
        rows = math.ceil(len(labels) / most)
        figure.set_figheight(figure.get_figheight() + ROW_IN * max(0, rows - LEGEND_ROWS))
        legend = figure.legend(handles, labels, loc="outside upper left", ncols=math.ceil(len(labels) / rows))
        for line in legend.legend_handles:
            if line is not None and (line.get_alpha() or 1) < 0.5:
                line.set(alpha=0.7, linewidth=0.8)


def count_ticks(axis: "Axis", *, short: bool = False) -> None:
    """Whole numbers with thousands separated, or with k and M."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins="auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    axis.set_major_formatter(EngFormatter(sep="") if short else FuncFormatter(lambda v, _: f"{v:,.10g}"))


def stage_name(ax: "Axes", text: str, x: float, **how: Any) -> None:
    """A stage's name above the axes."""
    ax.annotate(text, (x, 1), (0, 2), ("data", "axes fraction"), "offset points", size=6, color=style.MUTED, **how)


def _same_stages(runs: Sequence[Run]) -> bool:
    return len({tuple(run.boundaries) for run in runs}) == 1


def _mark_stages(ax: "Axes", run: Run) -> None:
    left, right = ax.get_xlim()
    edges = [left, *(place for place, _, _ in run.boundaries), right]
    names = [run.step_stages[0], *(after for _, _, after in run.boundaries)] if run.boundaries else []
    for name, start, end in zip(names, edges, edges[1:], strict=False):
        if start != left:
            ax.axvline(start, color=style.MUTED, linewidth=0.7, linestyle=(0, (1, 2)), zorder=1)
        stage_name(ax, name, (start + end) / 2, ha="center")
