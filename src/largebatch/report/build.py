"""Runs -> the sections of a report."""

from collections.abc import Sequence

from largebatch.report import axes, curves, series, summary, tables, trust
from largebatch.report.quantities import SCORES
from largebatch.report.read import Run
from largebatch.report.render import Block, KeyFigures, Notes, Section
from largebatch.report.style import Picture

MOST_DESCRIBED = 3  # runs; more are read off the comparison


def title_of(runs: Sequence[Run]) -> str:
    return f"Training report: {runs[0].name}" if len(runs) == 1 else f"Training report: {len(runs)} runs"


def lead_of(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return summary.sentence(runs[0])
    return "Runs: " + ", ".join(run.name for run in runs) + "."


def build(runs: Sequence[Run]) -> list[Section]:
    """All sections in order; draws the figures, so call it inside `style.style()`."""
    groups = tables.by_kind(runs)
    sections = [_summary(runs)]
    for kind, group in groups:
        prefix = "" if len(groups) == 1 else f"{_slug(kind)}-"
        heading = _kind_title(kind) if len(groups) > 1 else "Training"
        sections.append(Section(heading, _training(group, prefix, described=len(runs) <= MOST_DESCRIBED)))
        sections += _trust_sections(group, prefix)
    for kind, group in groups:
        suffix = "" if len(groups) == 1 else f": {_kind_title(kind)}"
        contents = [run.config for run in group]
        sections.append(Section(f"Configuration{suffix}", list(tables.side_by_side("Setting", group, contents))))
    environment = tables.side_by_side("Item", runs, [run.env for run in runs])
    sections.append(Section("Environment", list(environment) or ["Not recorded."]))
    return sections


def _summary(runs: Sequence[Run]) -> Section:
    blocks: list[Block] = []
    notes = [line if len(runs) == 1 else f"{run.name}: {line}" for run in runs for line in run.notes]
    if notes:
        blocks.append(Notes(notes))
    for run in runs if len(runs) <= MOST_DESCRIBED else []:
        if len(runs) > 1:
            blocks.append(summary.sentence(run))
        fellows = [other for other in runs if other.kind == run.kind and other is not run]
        figures = summary.key_figures(run, fellows)
        blocks += [KeyFigures(figures)] if figures else []
    if len(runs) > MOST_DESCRIBED:
        blocks += [tables.comparison_table(group) for _, group in tables.by_kind(runs)]
        machines = ", ".join(dict.fromkeys(filter(None, map(summary.machine_of, runs))))
        blocks += [f"Trained on {machines}."] if machines else []
    return Section("Summary", blocks)


def _training(runs: Sequence[Run], prefix: str, *, described: bool) -> list[Block]:
    blocks: list[Block] = []
    # A run's place gives it its colour: those without curves come last.
    placed = sorted(runs, key=lambda run: not run.steps["step"])
    if len(runs) > 1:
        blocks += [tables.comparison_table(runs)] if described else []
        final = curves.final_scores(placed, f"{prefix}final")
        blocks += [final] if final else []
    blocks.append(tables.stages_table(runs))
    blocks += _pictures([run for run in placed if run.steps["step"]], prefix)
    for table in (tables.evaluation_table(runs), tables.baselines_table(runs)):
        blocks += [table] if table.rows else []
    return blocks


def _pictures(runs: Sequence[Run], prefix: str) -> list[Picture]:
    """The wide loss curve first, then what else was measured, two by two."""
    trained = dict.fromkeys(key for run in runs for key in run.steps if series.finite(run.steps[key]))
    often = {key for run in runs for e in run.evaluations for key in e.values if _evaluated(run, key) > 1}
    main = next((key for key in ("mlm_loss", "loss") if key in trained), None)
    others = [key for key in trained if key.endswith(("loss", "accuracy")) and key != main]
    others += [key for key in SCORES if key in often and key not in others and key != main]
    drawn = [curves.curve(runs, main, f"{prefix}{_slug(main)}", wide=True)] if main else []
    if main and len(runs) > 1:
        drawn += [curves.curve(runs, main, f"{prefix}{_slug(main)}-by-{x.column[:4]}", x=x) for x in _other_axes(runs)]
    drawn += [curves.curve(runs, key, f"{prefix}{_slug(key)}") for key in sorted(others, key=_rank)]
    if "lr" in trained:
        drawn.append(curves.learning_rate(runs, f"{prefix}learning-rate"))
    if "grad_norm" in trained:
        drawn.append(curves.gradient_norm(runs, f"{prefix}gradient-norm"))
    speeds = ["tokens_per_s", "sequences_per_s", "mfu" if "mfu" in trained else "flops_per_s"]
    drawn += [curves.throughput(runs, key, f"{prefix}{_slug(key)}") for key in speeds if _positive(runs, key)]
    return drawn


def _other_axes(runs: Sequence[Run]) -> list[axes.XAxis]:
    """Samples where the batches differ, since steps then are no common measure; and time."""
    batches = {tuple(stage.settings.get("batch_size") for stage in run.stages) for run in runs}
    wanted = [*([axes.SAMPLES] if len(batches) > 1 else []), axes.training_time(runs)]
    return [x for x in wanted if all(len(series.finite(x.values(run))) == len(run.steps["step"]) for run in runs)]


def _trust_sections(runs: Sequence[Run], prefix: str) -> list[Section]:
    recorded = [run for run in runs if any(series.finite(row) for row in run.ratios.rows.values())]
    sections = []
    for i, run in enumerate(recorded):
        end = f"-{i + 1}" if len(recorded) > 1 else ""
        blocks: list[Block] = []
        if len(run.ratios.steps) > 1:
            blocks.append(trust.trust_heat_map(run, f"{prefix}trust-ratios-over-time{end}"))
        blocks.append(trust.trust_bars(run, f"{prefix}trust-ratios{end}"))
        blocks.append(tables.ratios_table(run))
        sections.append(
            Section("Trust ratios" + (f": {run.name}" if prefix or end else ""), blocks, 3 if prefix or end else 2)
        )
    return sections


def _kind_title(kind: str) -> str:
    name = summary.KINDS.get(kind, kind)
    return name[:1].upper() + name[1:]


def _evaluated(run: Run, key: str) -> int:
    return sum(key in e.values for e in run.evaluations)


def _positive(runs: Sequence[Run], key: str) -> bool:
    return any(value > 0 for run in runs for value in series.finite(run.steps.get(key, [])))


def _rank(key: str) -> tuple[int, str]:
    """Losses, accuracies, the rest; each in order of weight."""
    group = 0 if key.endswith("loss") else 1 if key.endswith("accuracy") else 2
    return group, f"{SCORES.index(key):02}" if key in SCORES else key


def _slug(key: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in key.lower())
