"""The figures' contents, before they become bytes: what a curve cannot show must be marked, and the names of many runs
must leave it room, stay apart, and stay inside the picture."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import synthetic
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from largebatch.report import axes, build, curves, style
from largebatch.report.read import Run, read_runs

STAGE = ("only", 128, 64, 12, 4e-3, 3)
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SWEEP = [f"bert-large-32768-lr-{rate}e-3-wd-{decay}-warm-3125-seed-0" for rate in (1, 2, 4, 8) for decay in (0.01, 0.1)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Figure]]:
    """Figures in place of their bytes."""
    figures: list[Figure] = []
    monkeypatch.setattr(style, "picture", lambda figure, *_, **__: figures.append(figure))
    with style.style():
        yield figures


def make(folder: Path, finite: set[int], **changes: Any) -> Run:
    """A run whose MLM loss is finite in these steps and in no evaluation."""
    synthetic.write_run(folder, **{"stages": (STAGE,), "evaluate_every": 4, "layers": ["fc.weight"], **changes})
    log = folder / "metrics.jsonl"
    events = [json.loads(line) for line in log.read_text().splitlines()]
    for event in events:
        if event["event"] == "eval" or (event["event"] == "step" and event["step"] not in finite):
            event["mlm_loss"] = math.nan
    log.write_text("\n".join(map(json.dumps, events)))
    return read_runs([folder])[0]


def points(ax: Axes) -> list[float]:
    """Where there are points that need no line to be seen."""
    return [float(x) for line in ax.lines if line.get_marker() == "o" for x in line.get_xdata()]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def entries(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


@pytest.mark.parametrize(("finite", "alone"), [({1}, [1]), ({1, 2, 5, 8, 9}, [5]), (set(range(1, 13)), [])])
def test_steps_without_neighbours_are_points(
    tmp_path: Path, drawn: list[Figure], finite: set[int], alone: list[int]
) -> None:
    """A line through one point is invisible; a line through neighbours needs no points."""
    curves.curve([make(tmp_path / "run", finite)], "mlm_loss", "loss")
    assert points(drawn[0].axes[0]) == alone
    assert "not finite" not in texts(drawn[0])


def test_a_single_step_is_a_point_in_every_figure(tmp_path: Path, drawn: list[Figure]) -> None:
    runs = [make(tmp_path / "run", {1}, stop_at=1)]
    curves.learning_rate(runs, "rate")
    curves.gradient_norm(runs, "norm")
    curves.throughput(runs, "tokens_per_s", "speed")
    assert [points(figure.axes[0]) for figure in drawn] == [[1]] * 3


def test_a_loss_that_is_never_finite_is_said_so(tmp_path: Path, drawn: list[Figure]) -> None:
    """In the axes where there is no curve at all, in the legend where another run has one."""
    never, always = make(tmp_path / "never", set()), make(tmp_path / "always", {*range(1, 13)})
    curves.curve([never], "mlm_loss", "loss")
    curves.curve([never, always], "mlm_loss", "loss")
    assert {"not finite", "unigram entropy 6.930 nat"} <= set(texts(drawn[0]))
    assert "not finite" not in texts(drawn[1])
    assert entries(drawn[1]) == ["never (not finite)", "always"]


def test_a_run_has_one_colour_in_all_figures(tmp_path: Path, drawn: list[Figure]) -> None:
    """The first run's steps are lost: it has final figures and no curve, and the others' curves keep their colours."""
    for name in "abc":
        synthetic.write_run(tmp_path / name, stages=(STAGE,), layers=["fc.weight"])
    log = tmp_path / "a" / "metrics.jsonl"
    log.write_text("\n".join(line for line in log.read_text().splitlines() if '"event": "step"' not in line))
    build.build(read_runs([tmp_path / name for name in "abc"]))
    final, curve, *_ = drawn
    dots = [line for line in final.axes[0].lines if line.get_marker() == "o"]
    colours = dict(
        zip([label.get_text() for label in final.axes[0].get_yticklabels()], map(Line2D.get_color, dots), strict=True)
    )
    assert set(colours) == {*"abc"}
    assert len({*colours.values()}) == 3
    lines = [line.get_color() for line in curve.legends[0].legend_handles]
    assert dict(zip(entries(curve), lines, strict=True)) == {name: colours[name] for name in "bc"}


def test_a_run_without_a_final_figure_keeps_its_row(tmp_path: Path, drawn: list[Figure]) -> None:
    """At the edge, where nothing but the axis makes room for it."""
    runs = [make(tmp_path / name, {1}) for name in "abc"]
    runs[2].summary["evaluation"] = {"num_sequences": 8}
    curves.final_scores(runs, "final")
    for ax in drawn[0].axes:
        assert ax.get_ylim() == (2.5, -0.5)
        assert [line.get_ydata()[0] for line in ax.lines if line.get_marker() == "o"] == [0, 1]


@pytest.mark.parametrize("baseline", [math.nan, math.inf])
def test_a_baseline_that_is_not_finite_is_no_line(tmp_path: Path, drawn: list[Figure], baseline: float) -> None:
    runs = [make(tmp_path / name, {1}, baselines={"unigram_mlm_loss": baseline}) for name in "ab"]
    curves.final_scores(runs, "final")
    curves.curve(runs, "mlm_loss", "loss")
    for figure in drawn:
        figure.draw_without_rendering()
        assert not any("unigram" in text.get_text() for ax in figure.axes for text in ax.texts)


def test_many_long_names_leave_room_for_the_curves(tmp_path: Path, drawn: list[Figure]) -> None:
    """Under a legend of two rows the axes of a figure in one column are 1.47 in high; under eight, with a name in each,
    they were 0.53 in."""
    names = [f"{letter * 15}-{letter.upper() * 15}" for letter in "abcdefgh"]
    runs = [make(tmp_path / name, {*range(1, 13)}) for name in names]
    curves.curve(runs, "mlm_loss", "loss")
    curves.curve(runs[:2], "mlm_loss", "loss")
    heights = []
    for figure in drawn:
        figure.draw_without_rendering()
        heights.append(figure.axes[0].get_position().height * figure.get_figheight())
        inside = figure.legends[0].get_window_extent()
        assert figure.bbox.x0 <= inside.x0 < inside.x1 <= figure.bbox.x1
    assert entries(drawn[0]) == names
    assert heights[0] == pytest.approx(heights[1], abs=0.02)  # rows come in whole pixels of 0.01 in
    assert drawn[1].get_figheight() == curves.HEIGHT_IN


def test_runs_of_one_learning_rate_share_a_short_entry(tmp_path: Path, drawn: list[Figure]) -> None:
    runs = [
        make(tmp_path / name, {1}, stages=((*STAGE[:4], RATES[i // 2], 3),), stop_at=3) for i, name in enumerate(SWEEP)
    ]
    curves.learning_rate(runs, "rate")
    curves.learning_rate(runs[:2], "rate")
    assert entries(drawn[0]) == [f"{axes.run_label(runs, i)} and 1 more" for i in (0, 2, 4, 6)]
    assert entries(drawn[1]) == []
    drawn[0].draw_without_rendering()
    assert drawn[0].legends[0].get_window_extent().x1 <= drawn[0].bbox.x1


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["lamb", "_sgd"], ["lamb", " _sgd"]),
        (SWEEP[:3], ["…lr-1e-3…wd-0.01-warm…", "…lr-1e-3…wd-0.1-warm…", "…lr-2e-3…wd-0.01-warm…"]),
        (SWEEP[::2], [f"…lr-{rate}e-3…" for rate in (1, 2, 4, 8)]),
        (["sgd", "x" * 20 + "y" * 20], ["sgd", "x" * 15 + "…" + "y" * 16]),
        (["x" * 20 + letter + "y" * 20 for letter in "ab"], ["x" * 20 + letter + "y" * 20 for letter in "ab"]),
        (["x-" * 20 + "x", "x-" * 20 + "x-2"], ["x-x-x-x-x-x-x-x…-x-x-x-x-x-x-x-x", "…x-2"]),
        ([SWEEP[0]], [f"{SWEEP[0][:15]}…{SWEEP[0][-16:]}"]),
        ([], []),
    ],
)
def test_names_are_shortened_together_and_stay_different(names: list[str], expected: list[str]) -> None:
    assert style.legend_labels(names) == expected
