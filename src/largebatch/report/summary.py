"""The short form: a run in a sentence, its key figures, and the tables of a terminal."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from largebatch.report import series
from largebatch.report.quantities import baselines, duration, final_figures, magnitude, quantity, scores, titled
from largebatch.report.read import Run
from largebatch.report.tables import Table, by_kind, comparison_table, optimizer_of

MOST_KEY_FIGURES = 4
KINDS = {"pretraining": "pre-training", "squad": "question answering"}


@dataclass(frozen=True)
class KeyFigure:
    """A final figure with what it is to be read against."""

    label: str
    value: str
    against: list[str]


def sentence(run: Run) -> str:
    """What was trained, how long, on what."""
    optimizer = optimizer_of(run)
    what = KINDS.get(run.kind, run.kind) + (f" with {optimizer}" if optimizer else "")
    if run.summary.get("parameters"):
        what += f", {magnitude(run.summary['parameters'])} parameters"
    parts = [f"{run.num_steps:,} steps"]
    samples = run.summary.get("samples") or max(series.finite(run.steps.get("samples", [])), default=0)
    if samples:
        parts.append(f"{magnitude(samples)} samples")
    if run.summary.get("tokens"):
        parts.append(f"{magnitude(run.summary['tokens'])} tokens")
    recipe = f" (recipe {run.recipe})" if run.recipe != run.name else ""
    took = f" in {duration(run.wall_s)}" if math.isfinite(run.wall_s) else ""
    machine = machine_of(run)
    return f"{run.name}{recipe}: {what}. {', '.join(parts)}{took}{f' on {machine}' if machine else ''}."


def machine_of(run: Run) -> str:
    """The device, in words; empty when it was not recorded."""
    env = run.env
    world = env.get("world_size")
    many = f"{world} × " if isinstance(world, int) and world > 1 else ""
    if env.get("gpu"):
        return f"{many}{env['gpu']}"
    threads = env.get("threads")
    with_threads = f" ({threads} thread{'s' if threads != 1 else ''})" if threads else ""
    return f"{many}{env['cpu']}{with_threads}" if env.get("cpu") else ""


def key_figures(run: Run, others: Sequence[Run]) -> list[KeyFigure]:
    """The first scores of a run beside their baselines; one of `others` with a random encoder is a baseline too."""
    figures = []
    for place, value in list(scores(run).items())[:MOST_KEY_FIGURES]:
        split, key = place
        what = quantity(key)
        compared = baselines(run, key)
        if not run.config.get("random_encoder"):
            untrained = [scores(other) for other in others if other.config.get("random_encoder")]
            compared += [("random encoder", found[place]) for found in untrained if place in found]
        against = []
        for label, base in compared:
            difference = what.difference(value - base)
            against.append(f"{label}: {what.text(base)}" + (f" ({difference})" if difference else ""))
        label = titled(split, what.label)
        figures.append(KeyFigure(label if run.complete else f"{label} (latest)", what.text(value), against))
    return figures


def summary_tables(runs: Sequence[Run]) -> list[Table]:
    """What a terminal shows: a table of one run, or one for each kind of run; narrow, long cells are for folding."""
    if len(runs) == 1:
        return [_one_run(runs[0])]
    tables = []
    for kind, group in by_kind(runs):
        table = comparison_table(group, most_scores=2)
        tables.append(Table(kind, table.columns, table.rows))
    return tables


def _one_run(run: Run) -> Table:
    planned = f" of {run.planned_steps:,}" if run.planned_steps and run.planned_steps != run.num_steps else ""
    rows = [["Status", "complete" if run.complete else "not complete"], ["Steps", f"{run.num_steps:,}{planned}"]]
    if math.isfinite(run.wall_s):
        rows.append(["Time in steps", duration(run.wall_s)])
    if machine_of(run):
        rows.append(["Machine", machine_of(run)])
    rows += [[figure.label, "; ".join([figure.value, *figure.against])] for figure in key_figures(run, [])]
    shown = list(scores(run))[:MOST_KEY_FIGURES]
    for (split, key), value in final_figures(run).items():
        if (split, key) not in shown:
            rows.append([titled(split, quantity(key).label), quantity(key).text(value)])
    rows += [["Note", note] for note in run.notes if not note.startswith("The run is not complete")]
    return Table(f"{run.name} ({run.kind})", ["", ""], rows)
