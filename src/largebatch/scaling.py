"""From a batch size to learning rate, warm-up, steps and stages: the LAMB paper's rules for not tuning.

Two rules carry one set of settings, found at a small batch, to every larger one (LAMB paper, section 4):

- **square-root scaling**: learning rate proportional to the square root of the batch (``sqrt_lr``);
- **linear-epoch warm-up**: the warm-up's share of the run proportional to the batch (``linear_epoch_warmup``).
  As a run over the same samples has inversely fewer steps, the warm-up is a constant *number* of steps.

``plan`` applies them to a ``Workload`` and gives back every stage's numbers and the schedule.

>>> from largebatch import plan
>>> for stage in plan("bert", 32_768).stages:
...     print(stage.name, stage.batch_size, stage.steps, stage.learning_rate, stage.warmup_steps)
seq128 32768 14063 0.005 3125
seq512 32768 1562 0.005 0
"""

import difflib
import math
import operator
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from types import MappingProxyType
from typing import Literal

from largebatch.schedules import PolynomialDecay, Schedule, Stages, Triangle

__all__ = ["WORKLOADS", "Phase", "Plan", "Stage", "Workload", "linear_epoch_warmup", "linear_lr", "plan", "sqrt_lr"]


def _count(argument: str, value: int) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"{argument} must be an integer in [1, inf), got {value!r}")
    return count


def _positive(argument: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{argument} must be in (0, inf), got {value!r}")
    return value


def sqrt_lr(batch_size: int, base_batch_size: int, base_learning_rate: float) -> float:
    """Return base_learning_rate * sqrt(batch_size / base_batch_size), the rule for LAMB.

    >>> sqrt_lr(512, base_batch_size=32_768, base_learning_rate=0.005)
    0.000625

    Raises:
        ValueError: an argument is not positive.

    Source: Krizhevsky 2014; LAMB paper, section 4.
    """
    ratio = _count("batch_size", batch_size) / _count("base_batch_size", base_batch_size)
    return _positive("base_learning_rate", base_learning_rate) * math.sqrt(ratio)


def linear_lr(batch_size: int, base_batch_size: int, base_learning_rate: float) -> float:
    """Return base_learning_rate * batch_size / base_batch_size, the rule of Goyal et al. for SGD with momentum.

    It is here for the baselines; for LAMB use ``sqrt_lr``.

    >>> linear_lr(8_192, base_batch_size=256, base_learning_rate=0.1)
    3.2

    Raises:
        ValueError: an argument is not positive.
    """
    ratio = _count("batch_size", batch_size) / _count("base_batch_size", base_batch_size)
    return _positive("base_learning_rate", base_learning_rate) * ratio


def linear_epoch_warmup(batch_size: int, base_batch_size: int, base_warmup: float) -> float:
    """Return base_warmup * batch_size / base_batch_size: the warm-up, in whatever measures *samples*.

    Args:
        batch_size: the batch to run at.
        base_batch_size: the batch ``base_warmup`` belongs to.
        base_warmup: epochs, samples, or a share of the run; not steps, whose number is the same at every batch.

    >>> linear_epoch_warmup(32_768, base_batch_size=512, base_warmup=0.3125)  # epochs of ImageNet
    20.0

    Raises:
        ValueError: an argument is not positive.

    Source: LAMB paper, section 4; the warm-up rows of its two untuned tables.
    """
    ratio = _count("batch_size", batch_size) / _count("base_batch_size", base_batch_size)
    return _positive("base_warmup", base_warmup) * ratio


@dataclass(frozen=True)
class Phase:
    """A part of a workload: its name, the length of its sequences (None for images), and its share of the samples."""

    name: str
    sequence_length: int | None
    share: Fraction


@dataclass(frozen=True)
class Workload:
    """What is trained, on how many samples, and the settings at one batch size that the rules carry to the others.

    Args:
        name: as ``plan`` and the tables print it.
        samples: sequences or images that the whole run sees, repeats included.
        phases: in order; their shares add up to 1.
        base_batch_size: the batch that the two settings below were chosen for.
        base_learning_rate: peak rate at that batch.
        base_warmup: warm-up at that batch, as a share of the run.
        curve: "polynomial" decays from the run's beginning and drops where the warm-up ends, "triangle" does not
            (``schedules.PolynomialDecay``, ``schedules.Triangle``).
        epochs: passes over the data that ``samples`` stand for, where that is a fixed number.
        tabled: the batch sizes at which the rules were tried.
        source: where the settings come from.

    Raises:
        ValueError: a number is not positive, the warm-up share is not in (0, 1), or the shares do not add up to 1.

    For a corpus of your own, change what differs:

    >>> from dataclasses import replace
    >>> mine = replace(WORKLOADS["bert"], name="mine", samples=2_000_000, base_learning_rate=2e-3,
    ...                base_batch_size=256, base_warmup=Fraction(1, 20), source="my own sweep", tabled=())
    >>> [(stage.steps, stage.warmup_steps) for stage in plan(mine, 1_024).stages]
    [(1758, 391), (195, 0)]
    """

    name: str
    samples: int
    phases: tuple[Phase, ...]
    base_batch_size: int
    base_learning_rate: float
    base_warmup: Fraction | float
    curve: Literal["polynomial", "triangle"] = "polynomial"
    epochs: int | None = None
    tabled: tuple[int, ...] = ()
    source: str = "given by the user"

    def __post_init__(self) -> None:
        _count("samples", self.samples)
        _count("base_batch_size", self.base_batch_size)
        _positive("base_learning_rate", self.base_learning_rate)
        if not 0 < self.base_warmup < 1:
            raise ValueError(f"base_warmup must be a share of the run in (0, 1), got {self.base_warmup!r}")
        if self.curve not in ("polynomial", "triangle"):
            raise ValueError(f"curve must be 'polynomial' or 'triangle', got {self.curve!r}")
        if not self.phases or sum(phase.share for phase in self.phases) != 1:
            shares = ", ".join(str(phase.share) for phase in self.phases)
            raise ValueError(f"phases must have shares (as fractions.Fraction) that add up to 1, got [{shares}]")
        if any(phase.share <= 0 for phase in self.phases):
            raise ValueError("phases must each have a share in (0, 1]")

    def learning_rate(self, batch_size: int) -> float:
        """Return the peak rate at ``batch_size`` by square-root scaling."""
        return sqrt_lr(batch_size, self.base_batch_size, self.base_learning_rate)

    def warmup_ratio(self, batch_size: int) -> Fraction:
        """Return the warm-up at ``batch_size`` as a share of the run, by the linear-epoch rule, exactly."""
        return Fraction(self.base_warmup) * _count("batch_size", batch_size) / self.base_batch_size

    def warmup_epochs(self, batch_size: int) -> float:
        """Return the warm-up at ``batch_size`` in epochs; ``ValueError`` where the workload has no epochs."""
        if self.epochs is None:
            raise ValueError(f"epochs must be set for a warm-up in epochs; the workload {self.name!r} has none")
        return float(self.warmup_ratio(batch_size) * self.epochs)

    @property
    def warmup_steps(self) -> int:
        """The warm-up in steps, which is the same at every batch size."""
        return round(self.samples * Fraction(self.base_warmup) / self.base_batch_size)


WORKLOADS = MappingProxyType(
    {
        "bert": Workload(
            name="bert",
            samples=512_000_000,  # a million steps of 512, the baseline's
            phases=(Phase("seq128", 128, Fraction(9, 10)), Phase("seq512", 512, Fraction(1, 10))),
            base_batch_size=32_768,
            base_learning_rate=5e-3,
            base_warmup=Fraction(1, 5),
            tabled=(512, 1_024, 2_048, 4_096, 8_192, 16_384, 32_768),
            source="LAMB paper, Table 4: square-root learning rate, linear-epoch warm-up",
        ),
        "resnet50": Workload(
            name="resnet50",
            samples=90 * 1_281_167,
            phases=(Phase("train", None, Fraction(1)),),
            base_batch_size=32_768,
            base_learning_rate=4e-2,
            base_warmup=Fraction(20, 90),
            curve="triangle",
            epochs=90,
            tabled=(512, 1_024, 2_048, 4_096, 8_192, 16_384, 32_768),
            source="LAMB paper, Table 5: square-root learning rate, linear-epoch warm-up",
        ),
    }
)
"""The paper's workloads by name."""

_MIXED = (65_536, 32_768)
# The paper prints 8,599 steps in all, and its loss plot ends stage 1 at 7,037. Nine tenths of 512M sequences are
# 7,031.25 batches of 65,536, so no rounding gives 7,037: it is taken as printed.
_MIXED_STEPS = (7_037, 1_562)
_MIXED_NOTE = (
    "Step counts as printed in the paper. They overrun its own samples by 0.08%: nine tenths of 512M sequences are "
    "7,032 batches of 65,536, not 7,037."
)
_RECIPES = ("sqrt", "nvidia")


@dataclass(frozen=True)
class Stage:
    """One stage of a run: ``steps`` updates at one batch size and sequence length (None for images).

    ``learning_rate`` is the peak. ``warmup_steps`` is 0 where the stage goes on with the curve of the one before:
    then ask ``Plan.schedule()`` for the rates, since the peak alone would be far too high.
    """

    name: str
    sequence_length: int | None
    batch_size: int
    steps: int
    learning_rate: float
    warmup_steps: int

    @property
    def samples(self) -> int:
        """Sequences or images the stage sees."""
        return self.steps * self.batch_size


@dataclass(frozen=True)
class Plan:
    """The stages of a run, the curve of its learning rate, and whose numbers they are. Print it to read it.

    Attributes:
        workload: name of the workload.
        recipe: "sqrt", the rules of this module, or "nvidia".
        stages: in order.
        curve: "polynomial" or "triangle", the shape of the decay.
        power: of the decay.
        rewarmup: True if each stage has a curve of its own, from 0 up and down again; False if one curve
            spans them all.
        source: where the rates come from.
        notes: what the paper leaves open or contradicts, and what was chosen.
    """

    workload: str
    recipe: str
    stages: tuple[Stage, ...]
    curve: Literal["polynomial", "triangle"]
    power: float
    rewarmup: bool
    source: str
    notes: tuple[str, ...] = ()

    @property
    def total_steps(self) -> int:
        """Updates of all stages together."""
        return sum(stage.steps for stage in self.stages)

    @property
    def samples(self) -> int:
        """Sequences or images of all stages together."""
        return sum(stage.samples for stage in self.stages)

    def schedule(self) -> Schedule:
        """Return the learning rate as a function of the run's step (updates already made, from 0).

        >>> rate = plan("bert", 32_768).schedule()
        >>> rate(3_125), rate(14_063) == rate.learning_rate * (1 - 14_063 / 15_625)
        (0.004, True)
        """
        if self.rewarmup:
            return Stages(tuple((self._curve(stage, stage.steps), stage.steps) for stage in self.stages))
        return self._curve(self.stages[0], self.total_steps)

    def _curve(self, stage: Stage, steps: int) -> Schedule:
        shape = PolynomialDecay if self.curve == "polynomial" else Triangle
        return shape(stage.learning_rate, steps, stage.warmup_steps, self.power)

    def __str__(self) -> str:
        rows = [("stage", "length", "batch", "steps", "rate", "warm-up")]
        for stage in self.stages:
            goes_on = not self.rewarmup and stage is not self.stages[0]
            rows.append(
                (
                    stage.name,
                    "-" if stage.sequence_length is None else f"{stage.sequence_length}",
                    f"{stage.batch_size:,}",
                    f"{stage.steps:,}",
                    f"{stage.learning_rate:.3e}",
                    "goes on" if goes_on else f"{stage.warmup_steps:,}",
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ("  ".join(map(str.rjust, row, widths)) for row in rows)
        spans = "a new one for each stage" if self.rewarmup else "one for the whole run"
        lines = [
            f"{self.workload}: {self.total_steps:,} steps, {self.samples:,} samples",
            *table,
            f"curve: {self.curve}, power {self.power:g}, {spans}",
            f"source: {self.source}",
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(textwrap.fill(line, 79, subsequent_indent="  ") for line in lines)


def plan(
    workload: str | Workload,
    batch_size: int | Sequence[int],
    *,
    recipe: str = "sqrt",
    samples: int | None = None,
    base_learning_rate: float | None = None,
    base_batch_size: int | None = None,
    base_warmup: Fraction | float | None = None,
    rewarmup: bool | None = None,
) -> Plan:
    """Return the untuned settings for a batch size: rate, warm-up and steps of each stage.

    Each phase takes its share of the samples; the first ones round their steps up, the last one down, so that the
    shares and the total both hold to one step. The peak rate of a stage is ``Workload.learning_rate``. One batch
    size makes one curve over all stages, as in BERT's own code: the paper does not say whether the second stage of
    such a run warms up again. Where the batch size changes, each stage has a curve of its own and the later ones
    warm up again, for ``Workload.warmup_ratio`` of the stage: a drop of the batch size is what destabilises.

    Args:
        workload: "bert", "resnet50", or a ``Workload`` of your own.
        batch_size: samples per update, all devices together; one for the whole run, or one per phase.
        recipe: "sqrt", the paper's rules; or "nvidia", for BERT at (65536, 32768) alone, NVIDIA's rates, warm-ups
            and power. The rates of that run were found in no source.
        samples: sequences or images of the whole run, in place of the workload's.
        base_learning_rate: peak rate at ``base_batch_size``, in place of the workload's.
        base_batch_size: the batch that ``base_learning_rate`` and ``base_warmup`` belong to. Give them with it.
        base_warmup: share of the run at ``base_batch_size``, in place of the workload's.
        rewarmup: whether each stage warms up on its own; None does so exactly where the batch size changes.

    Raises:
        ValueError: an unknown workload or recipe, a batch size for which the warm-up would not end in its stage
            (the message names the accepted range and the nearest), or a ``rewarmup=False`` that cannot be.

    >>> print(plan("bert", (65_536, 32_768), recipe="nvidia").stages[1])
    Stage(name='seq512', sequence_length=512, batch_size=32768, steps=1562, learning_rate=0.004, warmup_steps=200)
    >>> plan("resnet50", 16_384).stages[0].warmup_steps
    782

    Source: LAMB paper, section 4, Tables 1, 4 and 5.
    """
    work = _workload(workload, samples, base_learning_rate, base_batch_size, base_warmup)
    if recipe not in _RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(_RECIPES)}, got {recipe!r}{_nearest(recipe, _RECIPES)}")
    batches = _batches(work, batch_size)
    if rewarmup is None:
        rewarmup = len(set(batches)) > 1
    elif not rewarmup and len(set(batches)) > 1:
        raise ValueError(
            f"rewarmup must be True or None where the batch size changes, got False for batch_size={batches}: "
            "one curve has one peak"
        )
    printed = work.name == "bert" and batches == _MIXED and work.samples == WORKLOADS["bert"].samples
    steps = _MIXED_STEPS if printed else _steps(work, batches)
    if recipe == "nvidia":
        return _nvidia(work, batches, steps)

    stages = []
    for index, (phase, batch, count) in enumerate(zip(work.phases, batches, steps, strict=True)):
        again = math.floor(count * work.warmup_ratio(batch)) if rewarmup else 0
        warmup = again if index else work.warmup_steps
        if warmup >= count:
            raise ValueError(_too_large(work, phase, batch, count, warmup, first=index == 0))
        stages.append(Stage(phase.name, phase.sequence_length, batch, count, work.learning_rate(batch), warmup))
    notes = _notes(work, batches, rewarmup, printed)
    return Plan(work.name, recipe, tuple(stages), work.curve, 1.0, rewarmup, work.source, notes)


def _nvidia(work: Workload, batches: tuple[int, ...], steps: tuple[int, ...]) -> Plan:
    theirs = {"batch_size": _MIXED, **vars(WORKLOADS["bert"])}
    given = {"batch_size": batches, **vars(work)}
    wrong = [f"{key}={given[key]!r}" for key in theirs if given[key] != theirs[key] and key not in ("source", "tabled")]
    if wrong:
        raise ValueError(f"recipe 'nvidia' must go with plan('bert', {_MIXED}) as it is, got {', '.join(wrong)}")
    settings = zip(work.phases, batches, steps, (6e-3, 4e-3), (2_000, 200), strict=True)
    stages = tuple(
        Stage(phase.name, phase.sequence_length, batch, count, rate, warmup)
        for phase, batch, count, rate, warmup in settings
    )
    notes = (
        "Rates, warm-ups and power 0.5 are those of NVIDIA's BERT-Large; the mixed run's were found in no source.",
        "NVIDIA itself runs 7,038 + 1,563 steps.",
        _MIXED_NOTE,
    )
    source = "NVIDIA's LAMB recipe for BERT-Large, on the paper's step counts"
    return Plan(work.name, "nvidia", stages, "polynomial", 0.5, True, source, notes)


def _workload(
    workload: str | Workload,
    samples: int | None,
    base_learning_rate: float | None,
    base_batch_size: int | None,
    base_warmup: Fraction | float | None,
) -> Workload:
    if isinstance(workload, str):
        if workload not in WORKLOADS:
            names = ", ".join(sorted(WORKLOADS))
            raise ValueError(f"workload must be one of {names}, got {workload!r}{_nearest(workload, WORKLOADS)}")
        workload = WORKLOADS[workload]
    if base_batch_size is not None and (base_learning_rate is None or base_warmup is None):
        raise ValueError(
            f"base_batch_size={base_batch_size!r} must come with base_learning_rate and base_warmup, which belong to it"
        )
    changed = [value is not None for value in (samples, base_learning_rate, base_batch_size, base_warmup)]
    if not any(changed):
        return workload
    return replace(
        workload,
        samples=workload.samples if samples is None else samples,
        base_learning_rate=workload.base_learning_rate if base_learning_rate is None else base_learning_rate,
        base_batch_size=workload.base_batch_size if base_batch_size is None else base_batch_size,
        base_warmup=workload.base_warmup if base_warmup is None else base_warmup,
        tabled=() if any(changed[1:]) else workload.tabled,
        source="the paper's rules on settings " + ("of the user" if any(changed[1:]) else "for the user's samples"),
    )


def _batches(work: Workload, batch_size: int | Sequence[int]) -> tuple[int, ...]:
    """One batch size for each phase."""
    batches = tuple(batch_size) if isinstance(batch_size, Sequence) else (batch_size,)
    if len(batches) == 1:
        batches *= len(work.phases)
    if len(batches) != len(work.phases):
        names = ", ".join(phase.name for phase in work.phases)
        raise ValueError(f"batch_size must be one integer or one for each of ({names}), got {batch_size!r}")
    return tuple(_count("batch_size", batch) for batch in batches)


def _steps(work: Workload, batches: tuple[int, ...]) -> tuple[int, ...]:
    exact = [work.samples * phase.share / batch for phase, batch in zip(work.phases, batches, strict=True)]
    steps = tuple(math.floor(n) if 0 < i == len(exact) - 1 else math.ceil(n) for i, n in enumerate(exact))
    for phase, batch, count in zip(work.phases, batches, steps, strict=True):
        if count < 1:
            raise ValueError(
                f"batch_size of {phase.name} must be at most the samples of that phase, "
                f"{phase.share} of {work.samples}, got {batch}"
            )
    return steps


def _too_large(work: Workload, phase: Phase, batch: int, steps: int, warmup: int, *, first: bool) -> str:
    """The message for a warm-up that would not end in its stage, with the largest batch for which it does."""
    # ceil(samples / batch) > warmup in the first stage; floor(steps * ratio) < steps, so ratio < 1, in a later one.
    limit = work.samples * phase.share / warmup if first else 1 / work.warmup_ratio(1)
    most = math.ceil(limit) - 1
    tried = f"; tried in the paper: {', '.join(map(str, work.tabled))}" if work.tabled else ""
    return (
        f"batch_size of {phase.name} must be an integer in [1, {most}] at these settings, got {batch}: the warm-up "
        f"of {warmup} steps would not end within the stage's {steps}. Nearest accepted: {most}{tried}"
    )


def _nearest(given: str, names: Sequence[str] | MappingProxyType[str, Workload]) -> str:
    close = difflib.get_close_matches(given, list(names), n=1, cutoff=0.3)
    return f"; did you mean {close[0]!r}?" if close else ""


def _notes(work: Workload, batches: tuple[int, ...], rewarmup: bool, printed: bool) -> tuple[str, ...]:
    notes = []
    for batch in sorted(set(batches) - set(work.tabled)) if work.tabled and not printed else ():
        nearest = min(work.tabled, key=lambda tabled: abs(math.log(tabled / batch)))
        notes.append(f"Batch {batch:,}: no row of the paper's table, but its rule; the nearest row is {nearest:,}.")
    if printed:
        notes.append("The sources found do not print this run's rates and warm-ups: these are the paper's rules.")
        notes.append(_MIXED_NOTE)
    if len(work.phases) > 1:
        if rewarmup:
            notes.append("Each later stage warms up again, for its batch size's share of the stage.")
        else:
            notes.append(
                "One curve over all stages. Whether the paper's single-batch runs warm up again is not stated; "
                "--rewarmup (rewarmup=True) does."
            )
    if work.name == "resnet50":
        notes.append(
            "Goes with weight decay 1.5 as part of u (decoupled_weight_decay stays off), batch-norm parameters "
            "excluded: not BERT's 0.01."
        )
    return tuple(notes)
