"""Tables of a report: stages, evaluation, comparison, trust ratios, settings side by side."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from largebatch.report import series
from largebatch.report.layers import arrange
from largebatch.report.quantities import (
    KNOWN,
    SCORES,
    baselines,
    compact,
    duration,
    flatten,
    magnitude,
    quantity,
    scores,
    split_name,
    titled,
)
from largebatch.report.read import Run, Stage, number

ABSENT = "–"
OPTIMIZERS = {"lamb": "LAMB", "nlamb": "N-LAMB", "nnlamb": "NN-LAMB", "lars": "LARS", "adamw": "AdamW", "adam": "Adam",
              "sgd": "SGD", "adagrad": "Adagrad"}  # fmt: skip
MOST_EVALUATIONS = 24  # rows of all runs together, but at least 3 and at most 12 of each


@dataclass(frozen=True)
class Table:
    """Rows of text under `columns`; the first column names the row."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def stages_table(runs: Sequence[Run]) -> Table:
    """One row for each stage: what was planned, what was done, how fast."""
    columns = ["Stage", "Sequence length", "Batch", "Steps", "Peak learning rate", "Warm-up steps", "Samples",
               "Token positions", "Time", "Median sequences/s"]  # fmt: skip
    rows = []
    for run in runs:
        begun_s = 0.0
        for stage in run.stages:
            mine = [i for i, name in enumerate(run.step_stages) if name == stage.name]
            ends = series.finite(run.steps["time_s"][i] for i in mine) if "time_s" in run.steps else []
            took = duration(ends[-1] - begun_s) if ends else ABSENT
            begun_s = ends[-1] if ends else begun_s
            label = stage.name if len(runs) == 1 else f"{run.name}: {stage.name}"
            rows.append([label, *_stage_cells(run, stage, mine), took, _median(run, "sequences_per_s", mine)])
    kept = [i for i in range(len(columns)) if i == 0 or any(row[i] != ABSENT for row in rows)]
    return Table("Stages", [columns[i] for i in kept], [[row[i] for i in kept] for row in rows])


def _stage_cells(run: Run, stage: Stage, mine: Sequence[int]) -> list[str]:
    settings = stage.settings
    batch, planned, length = (settings.get(key) for key in ("batch_size", "steps", "sequence_length"))
    steps = f"{len(mine):,}" if not planned or planned == len(mine) else f"{len(mine):,} of {planned:,}"
    rate = settings.get("learning_rate")
    if rate is None and "lr" in run.steps:  # set by rule, so that what was reached says it
        rate = max(series.finite(run.steps["lr"][i] for i in mine), default=None)
    samples = batch * len(mine) if isinstance(batch, int) else None
    positions = magnitude(samples * length) if samples is not None and isinstance(length, int) else ABSENT
    rate_text = ABSENT if rate is None else f"{number(rate):.4g}"
    warmup = settings.get("warmup_steps")
    return [_count(length), _count(batch), steps, rate_text, _count(warmup), _count(samples), positions]


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, (int, float)) else ABSENT


def _median(run: Run, key: str, mine: Sequence[int]) -> str:
    value = series.quantile((run.steps[key][i] for i in mine), 0.5) if key in run.steps else series.NAN
    return compact(float(f"{value:.4g}")) if math.isfinite(value) else ABSENT


def evaluation_table(runs: Sequence[Run]) -> Table:
    """The evaluations over training, some evenly chosen where there are many."""
    everything = [e.values for run in runs for e in run.evaluations]
    # The size of the split, the same each time, is no result.
    counts = {
        k for k in {k for v in everything for k in v} if k not in KNOWN and len({v.get(k) for v in everything}) == 1
    }
    found = {key for values in everything for key in values if key not in counts}
    keys = sorted(found, key=lambda key: (SCORES.index(key) if key in SCORES else len(SCORES), key))
    most = min(12, max(3, MOST_EVALUATIONS // len(runs)))
    rows, left_out = [], 0
    for run in runs:
        chosen = _evenly(run.evaluations, most)
        left_out += len(run.evaluations) - len(chosen)
        for e in chosen:
            cells = [quantity(key).text(e.values[key], unit=False) if key in e.values else ABSENT for key in keys]
            rows.append([*_naming(runs, run.name), f"{e.step:,}", split_name(e.split), *cells])
    title = "Evaluation" + (f" ({left_out} between these are left out)" if left_out else "")
    return Table(title, [*_naming(runs, "Run"), "Step", "Split", *(quantity(key).axis for key in keys)], rows)


def _evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def comparison_table(runs: Sequence[Run], most_scores: int = 6) -> Table:
    """One row for each run: length, time, and the figures it is judged by."""
    per_run = [scores(run) for run in runs]
    places = sorted({place for s in per_run for place in s}, key=lambda p: (SCORES.index(p[1]), p[0]))[:most_scores]
    one_split = len({split for split, _ in places}) == 1
    heads = [quantity(key).axis if one_split else titled(split, quantity(key).axis) for split, key in places]
    settings = {"Optimizer": [optimizer_of(run) for run in runs], "Batch": [_batches(run) for run in runs]}
    settings = {name: values for name, values in settings.items() if len(set(values)) > 1}
    rows = []
    for i, (run, figures) in enumerate(zip(runs, per_run, strict=True)):
        cells = [quantity(p[1]).text(figures[p], unit=False) if p in figures else ABSENT for p in places]
        planned = f" of {run.planned_steps:,}" if not run.complete and run.planned_steps else ""
        took = duration(run.wall_s) if math.isfinite(run.wall_s) else ABSENT
        chosen = [values[i] or ABSENT for values in settings.values()]
        rows.append([run.name, *chosen, f"{run.num_steps:,}{planned}", took, *cells])
    return Table("Comparison", ["Run", *settings, "Steps", "Time", *heads], rows)


def optimizer_of(run: Run) -> str:
    """The optimizer's name as its authors write it; empty when it was not recorded."""
    optimizer = run.config.get("optim")
    name = optimizer.get("name") if isinstance(optimizer, Mapping) else optimizer
    return OPTIMIZERS.get(name, name) if isinstance(name, str) else ""


def _batches(run: Run) -> str:
    sizes = [stage.settings.get("batch_size") for stage in run.stages]
    return " → ".join(dict.fromkeys(_count(size) for size in sizes if size is not None))


def baselines_table(runs: Sequence[Run]) -> Table:
    """The summary's baselines that are of no figure shown elsewhere."""
    rows = []
    for run in runs:
        attached = {value for _, key in scores(run) for _, value in baselines(run, key)}
        for name, value in flatten(run.summary.get("baselines") or {}):
            if name and value not in attached:
                text = compact(value) if isinstance(value, (int, float)) else str(value)
                rows.append([*_naming(runs, run.name), name.replace("_", " "), text])
    return Table("Baselines", [*_naming(runs, "Run"), "Baseline", "Value"], rows)


def ratios_table(run: Run) -> Table:
    """The medians of each kind of layer's trust ratio at the first and the last record, and its spread over all."""
    order, groups = arrange(list(run.ratios.rows))
    rows = []
    for group in groups:
        recorded = [run.ratios.rows[layer] for layer in order[group.start : group.stop]]
        columns = [[row[0] for row in recorded], [row[-1] for row in recorded], [v for row in recorded for v in row]]
        first, last, every = (series.finite(column) for column in columns)
        quantiles = [(first, 0.5), (last, 0.5), (every, 0.0), (every, 0.5), (every, 1.0)]
        rows.append([group.label, *(f"{series.quantile(v, q):.3g}" if v else ABSENT for v, q in quantiles)])
    span = f"Step {run.ratios.steps[0]:,}", f"Step {run.ratios.steps[-1]:,}"
    return Table("Trust ratios by layer", ["Layer", *span, "Least", "Median", "Greatest"], rows)


def side_by_side(title: str, runs: Sequence[Run], contents: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Settings that differ between the runs, a column for each, then those they share."""
    flat = [{name: _plain(value) for name, value in flatten(content) if name} for content in contents]
    names = list(dict.fromkeys(name for one in flat for name in one))
    rows = [[name, *(one.get(name, ABSENT) for one in flat)] for name in names]
    if len(runs) == 1:
        return [Table("", [title, "Value"], rows)] if rows else []
    differ = [row for row in rows if len(set(row[1:])) > 1]
    same = [row[:2] for row in rows if len(set(row[1:])) == 1]
    tables = [
        Table("What differs", [title, *(run.name for run in runs)], differ),
        Table("The same in all", [title, "Value"], same),
    ]
    return [table for table in tables if table.rows]


def by_kind(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """The runs of each kind, kinds in order of first appearance."""
    kinds = dict.fromkeys(run.kind for run in runs)
    return [(kind, [run for run in runs if run.kind == kind]) for kind in kinds]


def _naming(runs: Sequence[Run], name: str) -> Iterable[str]:
    """The cell that names the run, where there is more than one."""
    return [name] if len(runs) > 1 else []


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "none"
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value) or "(empty)"
    if isinstance(value, Mapping):
        return "(empty)"
    return f"{value:g}" if isinstance(value, float) else str(value)
