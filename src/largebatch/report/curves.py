"""Figures over training: losses, accuracies, learning rate, gradient norm, throughput, for one run or several."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from largebatch.report import axes, series, style
from largebatch.report.quantities import Quantity, baselines, flatten, quantity, scores, split_name, titled
from largebatch.report.read import Run, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT_IN, WIDE_HEIGHT_IN = 2.15, 2.6
MARKERS = ("o", "s", "D", "^")


def curve(runs: Sequence[Run], key: str, name: str, *, x: axes.XAxis = axes.STEP, wide: bool = False) -> style.Picture:
    """One quantity over training, with its evaluations as points and its baselines dashed."""
    what = quantity(key)
    figure = style.new_figure(wide, WIDE_HEIGHT_IN if wide else HEIGHT_IN)
    ax = figure.add_subplot()
    shown: list[float] = []
    widths: set[int] = set()
    for i, run in enumerate(runs):
        ys = [v * what.scale for v in run.steps.get(key, [])]
        if series.finite(ys):
            mean, width = axes.draw_run(ax, runs, i, ys, x=x)
            axes.mark_divergence(ax, x.values(run), mean, i)
            widths.add(width)
            shown += mean
        elif ys:
            axes.name_without_curve(ax, runs, i)
        shown += _draw_evaluations(ax, runs, i, key, what, x)
    if not series.finite(shown):
        axes.note(ax, "not finite", 0.5, 0.25, (0, 0), "axes fraction", ha="center", va="center")
    lines = {(label, value * what.scale) for run in runs for label, value in baselines(run, key)}
    axes.set_range(ax, [*shown, *(value for _, value in lines)], what)
    low, high = ax.get_ylim()
    lines = {(label, value) for label, value in lines if low <= value <= high}
    for label, value in sorted(lines, key=lambda line: line[1]):
        axes.horizontal(ax, value, f"{label} {what.text(value / what.scale)}")
    axes.finish(figure, ax, runs, what.axis, x)
    return style.picture(figure, name, _curve_caption(what, runs, key, widths, bool(lines), x), wide=wide)


def learning_rate(runs: Sequence[Run], name: str) -> style.Picture:
    """The learning rate of every step, warm-up and re-warm-up included."""
    figure = style.new_figure(False, HEIGHT_IN)
    ax = figure.add_subplot()
    top = max(series.finite(v for run in runs for v in run.steps.get("lr", [])), default=1.0)
    power = math.floor(math.log10(top)) if top > 0 else 0
    curves: dict[tuple[tuple[float, ...], ...], list[int]] = {}
    for i, run in enumerate(runs):
        curves.setdefault((tuple(run.steps["step"]), tuple(run.steps.get("lr", []))), []).append(i)
    for (steps, rates), same in curves.items():
        if rates:
            scaled = [v / 10.0**power for v in rates]
            more = f" and {len(same) - 1} more" if len(same) > 1 else ""
            label = axes.run_label(runs, same[0]) + more if len(curves) > 1 else None
            axes.draw_line(ax, steps, scaled, same[0], 700, label)
    ax.set_ylim(bottom=0)
    axes.finish(figure, ax, runs, "Learning rate" + (f" (×10{style.superscript(power)})" if power else ""))
    alike = ", the same in all runs" if len(curves) == 1 < len(runs) else ""
    return style.picture(figure, name, f"Learning rate of every step{alike}.")


def gradient_norm(runs: Sequence[Run], name: str) -> style.Picture:
    """The gradient's global norm against the clipping threshold, and how often it was clipped."""
    what = quantity("grad_norm")
    figure = style.new_figure(False, HEIGHT_IN)
    ax = figure.add_subplot()
    ax.set_yscale("log")
    shares, shown = [], []
    for i, run in enumerate(runs):
        norms = [v if v > 0 else series.NAN for v in run.steps.get("grad_norm", [])]
        if not series.finite(norms):
            continue
        mean, _ = axes.draw_run(ax, runs, i, norms)
        axes.mark_divergence(ax, run.steps["step"], mean, i)
        shown += series.finite(norms) if len(runs) <= axes.MOST_NOISY else series.finite(mean)
        clipped = series.finite(run.steps.get("clipped", []))
        if clipped:
            shares.append((run.name, f"{sum(clipped) / len(clipped):.0%}"))
    thresholds = sorted({limit for run in runs for limit in _clip_thresholds(run)})
    for limit in thresholds:
        axes.horizontal(ax, limit, f"clipped to {limit:g}")
    axes.log_range(ax.yaxis, [*shown, *thresholds])
    axes.finish(figure, ax, runs, what.axis)
    clipping = f"; clipped in {_each(shares)} of the steps" if shares else ""
    return style.picture(figure, name, f"Global gradient norm before clipping{clipping}.")


def throughput(runs: Sequence[Run], key: str, name: str) -> style.Picture:
    """A speed over training, from zero."""
    from matplotlib.ticker import EngFormatter

    what = quantity(key)
    figure = style.new_figure(False, HEIGHT_IN)
    ax = figure.add_subplot()
    tops, medians = [1e-9], []
    for i, run in enumerate(runs):
        ys = [v * what.scale for v in run.steps.get(key, [])]
        if series.finite(ys):
            axes.draw_run(ax, runs, i, ys)
            tops.append(series.quantile(ys, 0.98))
            medians.append((run.name, what.text(series.quantile(run.steps[key], 0.5))))
    ax.set_ylim(0, 1.15 * max(tops))
    if what.unit != "%":
        ax.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.finish(figure, ax, runs, what.axis)
    remark = {
        "tokens_per_s": " Padding is not counted.",
        "mfu": " The model's FLOPs on tokens without padding, as a share of the rate measured for a matrix product.",
    }.get(key, "")
    return style.picture(figure, name, f"{what.label}; median {_each(medians)}.{remark}")


def final_scores(runs: Sequence[Run], name: str) -> style.Picture | None:
    """The runs' final figures side by side, a panel for each of at most three quantities; None when none is shared."""
    per_run = [scores(run) for run in runs]
    places = dict.fromkeys(place for figures in per_run for place in figures)
    shared = [p for p in places if sum(math.isfinite(f.get(p, series.NAN)) for f in per_run) > 1][:3]
    if not shared:
        return None
    figure = style.new_figure(True, 0.75 + 0.19 * len(runs))
    panels = figure.subplots(1, len(shared), sharey=True, squeeze=False)[0]
    for ax, (split, key) in zip(panels, shared, strict=True):
        what = quantity(key)
        for row, figures in enumerate(per_run):
            value = figures.get((split, key), series.NAN)
            if math.isfinite(value):
                ax.plot(value * what.scale, row, "o", color=axes.look(row)["color"], markersize=4)
                axes.note(ax, what.text(value), value * what.scale, row, (6, 0), va="center")
        for label, value in sorted({b for run in runs for b in baselines(run, key) if math.isfinite(b[1])}):
            ax.axvline(value * what.scale, color=style.INK, linewidth=0.8, linestyle=(0, (5, 2)))
            axes.note(ax, label, value * what.scale, 1, (0, 2), ("data", "axes fraction"), ha="center")
        ax.set_xlabel(titled(split, what.axis))
        ax.margins(x=0.45)
        ax.spines["left"].set_visible(False)
        ax.tick_params(axis="y", length=0)
        ax.locator_params(axis="x", nbins=4)
    panels[0].set_yticks(range(len(runs)), style.legend_labels([run.name for run in runs]))
    panels[0].set_ylim(len(runs) - 0.5, -0.5)
    return style.picture(figure, name, "Final evaluation of each run.", wide=True)


def _draw_evaluations(ax: "Axes", runs: Sequence[Run], i: int, key: str, what: Quantity, x: axes.XAxis) -> list[float]:
    """Evaluations as open points. A single run's have a line and a colour of their own; in an overlay they have the
    run's colour, and a line only where no training curve is there to follow."""
    run, overlay, drawn = runs[i], len(runs) > 1, []
    found = [e for e in run.evaluations if math.isfinite(e.values.get(key, series.NAN))]
    followed = bool(series.finite(run.steps.get(key, [])))
    for k, split in enumerate(dict.fromkeys(e.split for e in found)):
        points = [(x.at(run, e.step), e.values[key] * what.scale) for e in found if e.split == split]
        style_ = axes.look(i if overlay else i + k + followed)
        label = (axes.run_label(runs, i) if k == 0 else None) if overlay else split_name(split)
        if overlay and followed:
            style_["linestyle"], label = "none", None
        marker = MARKERS[k % 4] if len(points) <= 60 or style_["linestyle"] == "none" else ""
        ax.plot(*zip(*points, strict=True), **style_, marker=marker, markersize=3, markeredgewidth=0.9, linewidth=0.8,
                markerfacecolor=style.PAPER, label=label, zorder=3)  # fmt: skip
        drawn += [value for _, value in points]
    return drawn


def _clip_thresholds(run: Run) -> list[float]:
    keys = ("max_grad_norm", "clip_grad_norm", "clip_norm", "grad_clip")
    return [number(v) for name, v in flatten(run.config) if name.rpartition(".")[2] in keys and number(v) > 0]


def _each(values: Sequence[tuple[str, str]]) -> str:
    """A figure of each run: bare for a single one, otherwise with the run's name."""
    return values[0][1] if len(values) == 1 else ", ".join(f"{value} ({run})" for run, value in values)


def _curve_caption(
    what: Quantity, runs: Sequence[Run], key: str, widths: set[int], compared: bool, x: axes.XAxis
) -> str:
    parts = [what.label + {"step": "", "samples": " by samples seen", "time_s": " by training time"}[x.column]]
    if max(widths, default=1) > 1:
        span = " to ".join(f"{w}" for w in sorted({min(widths), max(widths)}))
        steps = f"the mean of {span} steps within a stage"
        parts.append(f"thin: every step, thick: {steps}" if len(runs) <= axes.MOST_NOISY else f"lines: {steps}")
    splits = {split_name(e.split) for run in runs for e in run.evaluations if key in e.values}
    if splits:
        parts.append(f"open points: evaluation ({', '.join(sorted(splits))})")
    if len({tuple(run.boundaries) for run in runs}) > 1:
        parts.append("bars across a curve: change of stage")
    if compared:
        parts.append("dashed: baseline")
    return "; ".join(parts) + "."
