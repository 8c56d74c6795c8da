"""A run directory -> one `Run`: what was configured, what happened, what came out.

The reader is liberal, since a report must be had of a run that is going on, that crashed, or that an older or newer
version wrote: unknown events and keys are ignored, and whatever is odd but bearable becomes a note of the report.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from largebatch.errors import UserError
from largebatch.report.series import NAN, finite


@dataclass(frozen=True)
class Evaluation:
    """Figures on one held-out split after `step` steps."""

    step: int
    split: str
    values: dict[str, float]


@dataclass(frozen=True)
class TrustRatios:
    """`rows[name][i]` is the layer's ratio at `steps[i]`; NaN where none was recorded."""

    steps: list[int]
    rows: dict[str, list[float]]


@dataclass(frozen=True)
class Stage:
    """A stretch of steps; `first` and `last` are None when nothing of it was recorded."""

    name: str
    settings: dict[str, Any]
    first: int | None
    last: int | None


@dataclass(frozen=True)
class Run:
    """Everything a report says about one run.

    Attributes:
        name: how tables and legends call it.
        steps: column -> one value per recorded step, NaN where absent; "step" is the global step, from 1.
        step_stages: the stage of each recorded step.
        summary: empty while the run goes on.
        resumes: steps after which training was taken up again.
        notes: oddities a reader should know of.
    """

    path: Path
    name: str
    config: dict[str, Any]
    env: dict[str, Any]
    summary: dict[str, Any]
    steps: dict[str, list[float]]
    step_stages: list[str]
    evaluations: list[Evaluation]
    ratios: TrustRatios
    resumes: list[int]
    notes: list[str]

    @property
    def kind(self) -> str:
        return str(self.config.get("kind") or self.summary.get("kind") or "training")

    @property
    def recipe(self) -> str:
        return str(self.config.get("recipe") or self.summary.get("recipe") or self.name)

    @property
    def complete(self) -> bool:
        return self.summary.get("status") == "complete"

    @property
    def num_steps(self) -> int:
        """Steps done."""
        return int(max(self.steps.get("step", []), default=self.summary.get("steps") or 0))

    @property
    def planned_steps(self) -> int | None:
        counts = [stage.settings.get("steps") for stage in self.stages]
        known = [count for count in counts if isinstance(count, int) and count > 0]
        return sum(known) if counts and len(known) == len(counts) else None

    @property
    def wall_s(self) -> float:
        """Seconds of training, earlier sessions included."""
        recorded = max(finite(self.steps.get("time_s", [])), default=NAN)
        return number(self.summary["wall_s"]) if "wall_s" in self.summary else recorded

    @property
    def stages(self) -> list[Stage]:
        """The stages of the configuration, then any that only the metrics know."""
        configured = self.config.get("stages")
        settings = [dict(s) for s in configured if isinstance(s, Mapping)] if isinstance(configured, list) else []
        names = [str(s.get("name", f"stage {i + 1}")) for i, s in enumerate(settings)]
        spans: dict[str, list[int]] = {}
        for step, name in zip(self.steps.get("step", []), self.step_stages, strict=True):
            spans.setdefault(name, []).append(int(step))
        for name in spans:
            if name not in names and name:
                names.append(name)
                settings.append({})
        return [
            Stage(
                name, values, min(spans[name]) if name in spans else None, max(spans[name]) if name in spans else None
            )
            for name, values in zip(names, settings, strict=True)
        ]

    @property
    def boundaries(self) -> list[tuple[float, str, str]]:
        """(position between two steps, stage that ends, stage that begins)."""
        steps, names = self.steps.get("step", []), self.step_stages
        return [
            ((steps[i] + steps[i + 1]) / 2, names[i], names[i + 1])
            for i in range(len(names) - 1)
            if names[i] != names[i + 1]
        ]


@dataclass
class _Log:
    """The lines of metrics.jsonl, sorted by event, with the steps that a resume repeated kept once."""

    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    evaluations: dict[tuple[int, str], Evaluation] = field(default_factory=dict)
    ratios: dict[int, dict[str, float]] = field(default_factory=dict)
    resumes: list[int] = field(default_factory=list)

    def add(self, event: Mapping[str, Any]) -> None:
        step = event.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            return
        match event.get("event"):
            case "step":
                self.steps[step] = dict(event)
            case "eval":
                split = str(event.get("split", "held-out"))
                values = {k: number(v) for k, v in event.items() if k not in ("step", "stage_step") and is_number(v)}
                self.evaluations[step, split] = Evaluation(step, split, values)
            case "trust_ratios" if isinstance(event.get("ratios"), Mapping):
                self.ratios[step] = {str(k): number(v) for k, v in event["ratios"].items()}
            case "resume":
                self.resumes.append(step)
                self.steps = {s: v for s, v in self.steps.items() if s <= step}
                self.ratios = {s: v for s, v in self.ratios.items() if s <= step}
                self.evaluations = {k: v for k, v in self.evaluations.items() if k[0] <= step}


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read run directories, in order, and name each so that no two share a name.

    Raises:
        UserError: no path is given, one is no run directory, or a file in it cannot be read or understood.
    """
    if not paths:
        raise UserError("no run directory is given; name at least one")
    folders = [Path(path).expanduser().resolve() for path in paths]
    if len(set(folders)) < len(folders):
        raise UserError("a run directory is given twice; name each once")
    depth = 1
    while depth < 8 and len({_tail(folder, depth) for folder in folders}) < len(folders):
        depth += 1
    runs = []
    for folder in folders:
        try:
            runs.append(_read_run(folder, _tail(folder, depth)))
        except OSError as error:
            raise UserError(f"{error.filename or folder} cannot be read ({error.strerror}); make it readable") from None
    return runs


def _tail(folder: Path, depth: int) -> str:
    """The last `depth` names of a path; bytes that are not UTF-8 as `\\xff`."""
    name = "/".join(part for part in folder.parts[-depth:] if part != "/")
    return os.fsencode(name).decode(errors="backslashreplace")


def _read_run(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise UserError(f"{folder} is no directory; give a run directory, the folder that `largebatch train` wrote")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json; give a run directory, the folder that `largebatch train` wrote")
    config, notes = _read_object(folder / "config.json"), []
    if "kind" not in config and not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder} holds no run; give a run directory, the folder that `largebatch train` wrote")
    env = summary = {}
    if (folder / "env.json").is_file():
        env = _read_object(folder / "env.json")
    else:
        notes.append("env.json is missing: the machine and the software are not known.")
    if (folder / "summary.json").is_file():
        summary = _read_object(folder / "summary.json")
    log = _read_log(folder / "metrics.jsonl", notes)

    order = sorted(log.steps)
    names = dict.fromkeys(k for step in order for k, v in log.steps[step].items() if is_number(v))
    columns = {key: [number(log.steps[step].get(key)) for step in order] for key in names}
    columns["step"] = [float(step) for step in order]
    layers = dict.fromkeys(layer for ratios in log.ratios.values() for layer in ratios)
    recorded = sorted(log.ratios)
    run = Run(
        path=folder,
        name=name,
        config=config,
        env=env,
        summary=summary,
        steps=columns,
        step_stages=[str(log.steps[step].get("stage", "")) for step in order],
        evaluations=sorted(log.evaluations.values(), key=lambda e: e.step),
        ratios=TrustRatios(recorded, {n: [log.ratios[s].get(n, NAN) for s in recorded] for n in layers}),
        resumes=sorted(set(log.resumes)),
        notes=notes,
    )
    notes.extend(_observations(run))
    return run


def _observations(run: Run) -> list[str]:
    """What the record itself gives away: an unfinished run, resumes, losses that are not finite."""
    notes = []
    if not run.complete:
        planned = f" of {run.planned_steps:,}" if run.planned_steps else ""
        status = str(run.summary.get("status", "no summary.json yet"))
        notes.append(f"The run is not complete ({status}): {run.num_steps:,}{planned} steps are recorded.")
    if run.resumes:
        notes.append("Training was resumed after step " + ", ".join(f"{step:,}" for step in run.resumes) + ".")
    losses = run.steps.get("loss", [])
    bad = [int(step) for step, loss in zip(run.steps["step"], losses, strict=False) if not math.isfinite(loss)]
    if bad:
        notes.append(f"The loss is not finite in {len(bad):,} of {len(losses):,} steps, first at step {bad[0]:,}.")
    skipped = sum(value == 1 for value in run.steps.get("skipped", []))
    if skipped:
        notes.append(f"{skipped:,} steps left the weights alone because the gradient was not finite.")
    extra = run.summary.get("notes")
    return notes + [str(note) for note in extra] if isinstance(extra, list) else notes


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); restore it or run again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, not a JSON object; restore it or run again")
    return content


def _read_log(path: Path, notes: list[str]) -> _Log:
    """Read metrics.jsonl; none is a run before its first step, a last line cut short one in progress, a few bad ones
    are a crash."""
    log, unreadable = _Log(), []
    lines = path.read_bytes().splitlines() if path.is_file() else []
    for i, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
        except ValueError:
            unreadable.append(i)
            continue
        if isinstance(event, dict):
            log.add(event)
    if unreadable == [len(lines)]:
        notes.append("The last line of metrics.jsonl is cut short and was left out.")
    elif len(unreadable) > max(1, len(lines) // 100):
        raise UserError(
            f"{path} line {unreadable[0]} is not JSON, nor are {len(unreadable) - 1} more; restore the file"
        )
    elif unreadable:
        where = ", ".join(map(str, unreadable))
        notes.append(f"metrics.jsonl has lines that are not JSON, which were left out: {where}.")
    if not log.steps:
        notes.append("No step is recorded yet.")
    return log


def is_number(value: Any) -> bool:
    """Whether `value` can be a figure in a series: a number, a truth value, or null for "not known"."""
    return value is None or isinstance(value, (int, float))


def number(value: Any) -> float:
    """`value` as a float, NaN when it is none."""
    return float(value) if isinstance(value, (int, float)) else NAN
