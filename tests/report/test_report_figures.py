"""What figures are made of: layer names and their order, quantities and baselines, and a palette that colour-blind
readers can use."""

import itertools
import math
from pathlib import Path

import pytest
import synthetic

from largebatch.report import quantities, style
from largebatch.report.layers import arrange, short_names
from largebatch.report.read import read_runs


def test_few_layers_keep_their_order_and_are_named_one_by_one() -> None:
    names = synthetic.bert_layers(2)
    order, groups = arrange(names)
    assert order == names
    labels = [group.label for group in groups]
    assert labels[0] == "word embeddings"
    assert "L0 attention query" in labels
    assert {"L1 attention output", "L1 intermediate", "L1 output"} < set(labels)
    assert len(set(labels)) == len(names)


@pytest.mark.parametrize(("blocks", "everything", "count"), [(12, False, 78), (24, True, 398)])
def test_many_layers_are_sorted_by_kind_and_depth(blocks: int, everything: bool, count: int) -> None:
    names = synthetic.bert_layers(blocks, everything=everything)
    order, groups = arrange(names)
    assert len(names) == count
    assert sorted(order) == sorted(names)
    assert [g.start for g in groups[1:]] == [g.stop for g in groups[:-1]]
    assert (groups[0].start, groups[-1].stop) == (0, count)
    query = next(group for group in groups if group.label == f"attention query L0–{blocks - 1}")
    assert order[query.start : query.stop] == [
        f"bert.encoder.layer.{depth}.attention.self.query.weight" for depth in range(blocks)
    ]
    assert len({group.label for group in groups}) == len(groups)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["0.weight", "3.weight"], ["0", "3"]),
        (["layer1.1.conv1.weight", "layer1.0.conv1.weight"], ["layer1 1 conv1", "layer1 0 conv1"]),
        (["fc.weight", "fc.bias"], ["fc", "fc bias"]),
        (["bert.pooler.dense.weight", "pooler.weight"], ["bert.pooler.dense.weight", "pooler.weight"]),
        (["weight"], ["weight"]),
    ],
)
def test_short_names_stay_unique(names: list[str], expected: list[str]) -> None:
    """Where two would shorten to the same, both stay whole."""
    assert short_names(names) == expected


@pytest.mark.parametrize(
    ("recorded", "key", "expected"),
    [
        ({"unigram_mlm_loss": 6.9}, "mlm_loss", [("unigram entropy", 6.9)]),
        ({"unigram_mlm_loss": 6.9}, "loss", []),
        ({"unigram_entropy": 6.9}, "mlm_loss", [("unigram entropy", 6.9)]),
        ({"chance_nsp_accuracy": 0.5}, "nsp_accuracy", [("chance", 0.5)]),
        ({"chance_nsp_accuracy": 0.5}, "accuracy", []),
        ({"random_encoder": {"f1": 9.0, "exact_match": 4.0}}, "f1", [("random encoder", 9.0)]),
        ({"mlm_loss": 6.9, "remark": "measured"}, "mlm_loss", [("baseline", 6.9)]),
        ({"unigram_mlm_loss": None}, "mlm_loss", []),
    ],
)
def test_baselines_find_their_quantity(
    tmp_path: Path, recorded: dict[str, object], key: str, expected: list[tuple[str, float]]
) -> None:
    stages = (("only", 128, 32, 3, 1e-3, 1),)
    (run,) = read_runs([synthetic.write_run(tmp_path / "bert", stages=stages, baselines=recorded)])
    assert quantities.baselines(run, key) == expected


def test_final_figures_are_the_summary_s_or_else_the_latest(tmp_path: Path) -> None:
    complete, going = read_runs(
        [synthetic.write_run(tmp_path / "a"), synthetic.write_run(tmp_path / "b", stop_at=130, evaluate_every=60)]
    )
    expected = {("heldout", k): v for k, v in complete.summary["evaluation"].items() if k != "split"}
    assert quantities.final_figures(complete) == expected
    last = going.evaluations[-1]
    assert last.step == 120
    assert quantities.final_figures(going) == {("heldout", k): v for k, v in last.values.items()}
    assert [key for _, key in quantities.scores(complete)] == ["mlm_loss", "mlm_accuracy", "nsp_accuracy", "nsp_loss"]


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("mlm_loss", 6.1534, "6.153 nat"),
        ("accuracy", 0.99437, "99.44 %"),
        ("f1", 88.5, "88.50 %"),
        ("num_questions", 10570.0, "10,570"),
        ("loss", math.nan, "not finite"),
    ],
)
def test_quantities_are_written_with_their_unit(key: str, value: float, text: str) -> None:
    assert quantities.quantity(key).text(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234.0, "1,234"), (0.123456, "0.1235"), (12345.6, "12,346"), (math.nan, "not finite"), (-math.inf, "not finite")],
)
def test_numbers_without_a_unit_are_short(value: float, text: str) -> None:
    assert quantities.compact(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.5, "0.5 s"), (178.4, "2 min 58 s"), (3600, "1 h 0 min"), (200_000, "2 days 7 h")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert quantities.duration(seconds).replace("\u00a0", " ") == text


# Machado, Oliveira, Fernandes 2009, severity 1, on linear RGB.
VISION = {
    "ordinary": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.01182, 0.04294, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.3039)),
}


def linear(colour: str) -> list[float]:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]


def oklab(rgb: list[float]) -> tuple[float, float, float]:
    r, g, b = (max(0.0, part) for part in rgb)
    long = (0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b) ** (1 / 3)
    medium = (0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b) ** (1 / 3)
    short = (0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b) ** (1 / 3)
    return (
        0.2104542553 * long + 0.793617785 * medium - 0.0040720468 * short,
        1.9779984951 * long - 2.428592205 * medium + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * medium - 0.808675766 * short,
    )


def least_distance(colours: list[str]) -> float:
    """Of any two colours, as any of the four kinds of vision sees them."""
    distances = []
    for matrix in VISION.values():
        seen = [oklab([sum(m * p for m, p in zip(row, linear(c), strict=True)) for row in matrix]) for c in colours]
        distances += [math.dist(a, b) for a, b in itertools.combinations(seen, 2)]
    return min(distances)


def contrast(a: str, b: str) -> float:
    low, high = sorted(0.2126 * r + 0.7152 * g + 0.0722 * b_ for r, g, b_ in (linear(a), linear(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_the_palette_serves_every_kind_of_vision(dark: bool) -> None:
    """0.07 in OKLab is about three just-noticeable differences; the companion is matplotlib's own red and green."""
    colours = [style.DARK[c] if dark else c for c in style.SERIES]
    paper = style.DARK[style.PAPER] if dark else style.PAPER
    assert least_distance(colours) > 0.07
    assert least_distance(colours[:3]) > 0.10
    assert min(contrast(colour, paper) for colour in colours) > 2.8
    assert contrast(style.DARK[style.INK] if dark else style.INK, paper) > 7
    assert contrast(style.DARK[style.MUTED] if dark else style.MUTED, paper) > 4.5
    assert least_distance(["#d62728", "#2ca02c"]) < 0.05
