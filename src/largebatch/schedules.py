"""Learning-rate schedules: functions from a step to a rate, in plain floats.

**The index.** Every schedule is a function of ``step``, the number of updates *already made*: the first update
takes ``schedule(0)``, the last of ``T`` takes ``schedule(T - 1)``. That is the ``global_step`` of the LAMB authors'
code, and what ``torch.optim.lr_scheduler.LambdaLR`` hands its factor. So with a warm-up the first update has rate
0 (it fills the moments and moves nothing), the update after ``warmup_steps`` others has the peak or what the decay
leaves of it, and ``schedule(T)`` = the end rate is never used for an update. To start at ``peak / warmup_steps``
instead, begin the warm-up one step early: ``PolynomialDecay(..., start_warmup_step=-1)``.

Past its end a schedule keeps its end value. Schedules are frozen dataclasses: comparable, printable, picklable.

>>> from largebatch import schedules
>>> rate = schedules.PolynomialDecay(0.005, total_steps=15_625, warmup_steps=3_125)
>>> rate(0), round(rate(3_124), 7), rate(3_125)
(0.0, 0.0049984, 0.004)
"""

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

__all__ = [
    "Constant",
    "Piecewise",
    "PolynomialDecay",
    "Schedule",
    "Stages",
    "Triangle",
    "Warmup",
    "goyal",
]


def _integer(argument: str, value: int, low: int | None, high: int | None = None, high_is: str = "") -> None:
    """Refuse a value that is no integer of [low, high], naming the argument, the value and the range."""
    bounds = f"[{'-inf' if low is None else low}, {'inf' if high is None else high}{high_is and f' = {high_is}'}]"
    try:
        operator.index(value)
    except TypeError:
        raise ValueError(f"{argument} must be an integer in {bounds}, got {value!r}") from None
    if (low is not None and value < low) or (high is not None and value > high):
        raise ValueError(f"{argument} must be an integer in {bounds}, got {value!r}")


def _rate(argument: str, value: float, *, positive: bool = False) -> None:
    """Refuse a value that is no finite rate, naming the argument, the value and the range."""
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{argument} must be in {'(0' if positive else '[0'}, inf), got {value!r}")


def _power(value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"power must be in (0, inf), got {value!r}")


def _scaled(schedule: "Schedule", base_lr: float, step: int) -> float:
    return schedule(step) / base_lr


class Schedule(ABC):
    """A learning rate for every step; ``schedule(step)`` is the rate of the update made after ``step`` others."""

    def __call__(self, step: int) -> float:
        """Return the rate of the update that follows ``step`` finished ones; ``ValueError`` if ``step`` < 0."""
        _integer("step", step, 0)
        return float(self._at(operator.index(step)))

    @abstractmethod
    def _at(self, step: int) -> float: ...

    def as_factor(self, base_lr: float) -> Callable[[int], float]:
        """Return ``step -> schedule(step) / base_lr``, the factor that ``LambdaLR`` multiplies ``base_lr`` by.

        Args:
            base_lr: the ``lr`` the optimizer was built with. A group with another ``lr`` keeps its proportion.
                The product is the schedule's rate to one rounding, and exactly so when ``base_lr`` is 1.

        Raises:
            ValueError: ``base_lr`` is not finite and positive.

        The factor pickles, and adds nothing to ``LambdaLR.state_dict()``, which therefore still loads with
        ``weights_only=True``.

        >>> from largebatch.schedules import Triangle
        >>> factor = Triangle(0.04, total_steps=100, warmup_steps=20).as_factor(base_lr=0.04)
        >>> factor(0), factor(10), factor(20), factor(60)
        (0.0, 0.5, 1.0, 0.5)
        """
        _rate("base_lr", base_lr, positive=True)
        return partial(_scaled, self, base_lr)


@dataclass(frozen=True)
class Constant(Schedule):
    """The same rate for ever.

    >>> Constant(0.1)(1_000_000)
    0.1
    """

    learning_rate: float

    def __post_init__(self) -> None:
        _rate("learning_rate", self.learning_rate)

    def _at(self, step: int) -> float:
        return self.learning_rate


@dataclass(frozen=True)
class PolynomialDecay(Schedule):
    """The schedule of BERT, ALBERT and LAMB: a decay over the whole run, overridden during the warm-up.

    With s = step - start_warmup_step, init = learning_rate, T = total_steps:

        rate = init * s / warmup_steps                          while 0 <= s < warmup_steps
        rate = end + (init - end) * (1 - step / T) ** power     otherwise

    The decay counts from the run's beginning, so the rate *drops* at the end of the warm-up from ``init`` to
    ``init * (1 - warmup_steps / T) ** power``: in the paper's 32K run from 0.005 to 0.004. ``Triangle`` has no drop.

    Args:
        learning_rate: the peak that the warm-up aims at, and the decay's value at step 0.
        total_steps: T, the updates of the whole run; from there on the rate is ``end_learning_rate``.
        warmup_steps: updates of the linear ramp from 0; 0 for none.
        power: of the decay; 1 is the paper's, 0.5 NVIDIA's.
        end_learning_rate: what the decay reaches at T.
        start_warmup_step: where the ramp begins. Positive: warm up again there (before it the rate follows the
            decay; the authors' code, which only ever runs from there on, would go negative). Negative: begin
            part-way up the ramp; -1 gives the first update ``init / warmup_steps`` instead of 0.

    Raises:
        ValueError: a rate is negative or not finite, ``power`` <= 0, or the warm-up does not end within the run.

    >>> rate = PolynomialDecay(1.0, total_steps=10, warmup_steps=2)
    >>> [rate(step) for step in (0, 1, 2, 5, 10, 11)]
    [0.0, 0.5, 0.8, 0.5, 0.0, 0.0]

    Source: LAMB paper, section 4; the form is that of the authors' and Google's code.
    """

    learning_rate: float
    total_steps: int
    warmup_steps: int = 0
    power: float = 1.0
    end_learning_rate: float = 0.0
    start_warmup_step: int = 0

    def __post_init__(self) -> None:
        _rate("learning_rate", self.learning_rate)
        _rate("end_learning_rate", self.end_learning_rate)
        _power(self.power)
        _integer("total_steps", self.total_steps, 1)
        _integer("warmup_steps", self.warmup_steps, 0, self.total_steps, "total_steps")
        latest = self.total_steps - self.warmup_steps
        _integer("start_warmup_step", self.start_warmup_step, None, latest, "total_steps - warmup_steps")

    def _at(self, step: int) -> float:
        since = step - self.start_warmup_step
        if 0 <= since < self.warmup_steps:
            return self.learning_rate * since / self.warmup_steps
        left = 1 - min(step, self.total_steps) / self.total_steps
        return self.end_learning_rate + (self.learning_rate - self.end_learning_rate) * math.pow(left, self.power)


@dataclass(frozen=True)
class Triangle(Schedule):
    """Linear from 0 to the peak, then down over the *remaining* steps: no drop where the warm-up ends.

    With w = warmup_steps, T = total_steps:

        rate = learning_rate * step / w                                          while step < w
        rate = end + (learning_rate - end) * (1 - (step - w) / (T - w)) ** power     afterwards

    Args:
        learning_rate: the peak, taken by the update made after ``warmup_steps`` others.
        total_steps: T; from there on the rate is ``end_learning_rate``.
        warmup_steps: updates of the ramp, fewer than ``total_steps``; 0 starts at the peak.
        power: of the decay; 1 makes the triangle, 2 is what LARS recipes of MLPerf use.
        end_learning_rate: what the decay reaches at T.

    Raises:
        ValueError: a rate is negative or not finite, ``power`` <= 0, or no step is left after the warm-up.

    >>> rate = Triangle(1.0, total_steps=10, warmup_steps=2)
    >>> [rate(step) for step in (0, 1, 2, 6, 10, 11)]
    [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]

    Source: the LAMB authors' ImageNet and CIFAR-10 code.
    """

    learning_rate: float
    total_steps: int
    warmup_steps: int = 0
    power: float = 1.0
    end_learning_rate: float = 0.0

    def __post_init__(self) -> None:
        _rate("learning_rate", self.learning_rate)
        _rate("end_learning_rate", self.end_learning_rate)
        _power(self.power)
        _integer("total_steps", self.total_steps, 1)
        _integer("warmup_steps", self.warmup_steps, 0, self.total_steps - 1, "total_steps - 1")

    def _at(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.learning_rate * step / self.warmup_steps
        left = 1 - (min(step, self.total_steps) - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return self.end_learning_rate + (self.learning_rate - self.end_learning_rate) * math.pow(left, self.power)


@dataclass(frozen=True)
class Warmup(Schedule):
    """A linear ramp that joins any schedule without a jump: up to ``after(warmup_steps)``, then ``after`` itself.

    Args:
        after: the schedule to join. It counts from the run's beginning, the ramp included.
        warmup_steps: updates of the ramp; 0 changes nothing.
        start_learning_rate: the rate of the first update. Goyal et al. start at the rate of the small batch.

    Raises:
        ValueError: ``warmup_steps`` < 0, or ``start_learning_rate`` is negative or not finite.

    >>> rate = Warmup(Constant(1.0), warmup_steps=4)
    >>> [rate(step) for step in (0, 1, 2, 3, 4, 5)]
    [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """

    after: Schedule
    warmup_steps: int
    start_learning_rate: float = 0.0

    def __post_init__(self) -> None:
        _integer("warmup_steps", self.warmup_steps, 0)
        _rate("start_learning_rate", self.start_learning_rate)

    def _at(self, step: int) -> float:
        if step >= self.warmup_steps:
            return self.after(step)
        peak = self.after(self.warmup_steps)
        return self.start_learning_rate + (peak - self.start_learning_rate) * step / self.warmup_steps


@dataclass(frozen=True)
class Piecewise(Schedule):
    """A rate multiplied by ``gamma`` at each milestone, as torch's ``MultiStepLR``.

    Args:
        learning_rate: before the first milestone.
        milestones: steps in strictly ascending order; the update made after ``milestone`` others is the first
            with the new rate.
        gamma: the factor at each milestone.

    Raises:
        ValueError: the milestones do not ascend from 1 or more, or a number is negative or not finite.

    >>> rate = Piecewise(1.0, milestones=(3, 6), gamma=0.5)
    >>> [rate(step) for step in (2, 3, 5, 6)]
    [1.0, 0.5, 0.5, 0.25]
    """

    learning_rate: float
    milestones: tuple[int, ...]
    gamma: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))
        _rate("learning_rate", self.learning_rate)
        _rate("gamma", self.gamma)
        low = 1
        for milestone in self.milestones:
            _integer("milestones: each", milestone, low)
            low = milestone + 1

    def _at(self, step: int) -> float:
        return self.learning_rate * math.pow(self.gamma, sum(step >= milestone for milestone in self.milestones))


@dataclass(frozen=True)
class Stages(Schedule):
    """Schedules one after another, each counting from its own boundary: re-warm-up is a second stage's warm-up.

    Args:
        stages: pairs (schedule, steps). The update made after ``steps`` others of a stage is the next stage's
            step 0. The last stage's schedule also answers for what comes after it.

    Raises:
        ValueError: there is no stage, or one has less than one step.

    >>> mixed = Stages(((PolynomialDecay(6e-3, 7_037, 2_000), 7_037), (PolynomialDecay(4e-3, 1_562, 200), 1_562)))
    >>> mixed.total_steps, mixed.locate(7_037), mixed(7_037), mixed(7_137)
    (8599, (1, 0), 0.0, 0.002)

    Source: LAMB paper, section 4.1 (mixed-batch training).
    """

    stages: tuple[tuple[Schedule, int], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple((schedule, steps) for schedule, steps in self.stages))
        if not self.stages:
            raise ValueError("stages must hold at least one (schedule, steps) pair, got none")
        for index, (_, steps) in enumerate(self.stages):
            _integer(f"stages[{index}]: steps", steps, 1)

    @property
    def total_steps(self) -> int:
        """The updates of all stages together."""
        return sum(steps for _, steps in self.stages)

    def locate(self, step: int) -> tuple[int, int]:
        """Return the stage that the update after ``step`` others belongs to, and how many it has behind it there."""
        _integer("step", step, 0)
        for index, (_, steps) in enumerate(self.stages[:-1]):
            if step < steps:
                return index, step
            step -= steps
        return len(self.stages) - 1, step

    def _at(self, step: int) -> float:
        index, step = self.locate(step)
        return self.stages[index][0](step)


def goyal(
    learning_rate: float,
    steps_per_epoch: int,
    *,
    warmup_epochs: int = 5,
    epochs: tuple[int, ...] = (30, 60, 80),
    gamma: float = 0.1,
    start_learning_rate: float = 0.0,
) -> Warmup:
    """Return the schedule of Goyal et al. 2017: a warm-up, then a tenth of the rate at epochs 30, 60 and 80.

    Args:
        learning_rate: the peak; theirs is 0.1 per 256 images (``scaling.linear_lr``).
        steps_per_epoch: updates in one pass over the data.
        warmup_epochs: length of the ramp.
        epochs: where the rate is multiplied by ``gamma``.
        gamma: the factor at each of ``epochs``.
        start_learning_rate: of the first update; theirs is the unscaled 0.1.

    Raises:
        ValueError: as ``Piecewise`` and ``Warmup``, or ``steps_per_epoch`` < 1.

    >>> rate = goyal(3.2, steps_per_epoch=156)
    >>> rate(0), rate(5 * 156), round(rate(30 * 156), 10)
    (0.0, 3.2, 0.32)

    Source: LAMB paper, section 4.2, the "+" rows of its ImageNet table.
    """
    _integer("steps_per_epoch", steps_per_epoch, 1)
    _integer("warmup_epochs", warmup_epochs, 0)
    milestones = tuple(epoch * steps_per_epoch for epoch in epochs)
    return Warmup(Piecewise(learning_rate, milestones, gamma), warmup_epochs * steps_per_epoch, start_learning_rate)
