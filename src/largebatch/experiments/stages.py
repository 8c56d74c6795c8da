"""A run's stages: sizes checked, rates filled in, schedules built."""

import dataclasses
import functools
import math
from collections.abc import Callable

from largebatch import schedules
from largebatch.errors import UserError
from largebatch.experiments.config import RunConfig, StageConfig
from largebatch.train import Stage, distributed


def build_stages(config: RunConfig) -> list[Stage]:
    """The engine's stages: rates filled in by the square-root rule, schedules built.

    Raises:
        UserError: two stages of one name, a batch that the ranks cannot share, a warm-up longer than its stage, or an
            unknown schedule.
    """
    if not config.stages:
        raise UserError("the run has no stages")
    stages: list[Stage] = []
    offset = 0
    names = [stage.name for stage in config.stages]
    for index, stage in enumerate(config.stages):
        if names.index(stage.name) < index:
            raise UserError(
                f"stages.{index}.name: {stage.name!r} is the name of stage {names.index(stage.name)} too; set another, "
                "as the metrics tell stages apart by it"
            )
        _check_sizes(stage, f"stages.{index}")
        if stage.schedule == "continue" and index > 0:
            offset += config.stages[index - 1].steps
        else:
            curve, offset = _curve(config, index), 0
        rate = functools.partial(_rate, curve, offset)
        stages.append(Stage(stage.name, stage.steps, stage.batch_size, rate, stage.keep_moments))
    return stages


def with_warm_ups(config: RunConfig) -> RunConfig:
    """The configuration with a tenth of the steps as the warm-up of the stages that leave it open."""
    stages = [
        stage if stage.warmup_steps is not None else dataclasses.replace(stage, warmup_steps=round(0.1 * stage.steps))
        for stage in config.stages
    ]
    return dataclasses.replace(config, stages=tuple(stages))


def peak_rate(config: RunConfig, index: int) -> float:
    """A stage's own rate, or `optim.lr` scaled by the square root of its batch over the first stage's."""
    stage = config.stages[index]
    if stage.learning_rate is not None:
        return stage.learning_rate
    return config.optim.lr * math.sqrt(stage.batch_size / config.stages[0].batch_size)


def _check_sizes(stage: StageConfig, where: str) -> None:
    for name in ("batch_size", "steps"):
        if getattr(stage, name) < 1:
            raise UserError(f"{where}.{name} is {getattr(stage, name)}; it must be at least 1")
    if stage.batch_size % distributed.world_size():
        raise UserError(
            f"{where}.batch_size is {stage.batch_size}, no multiple of the {distributed.world_size()} ranks"
        )
    check_micro_batch(stage, stage.batch_size // distributed.world_size(), where)


def check_micro_batch(stage: StageConfig, rank_batch: int, where: str) -> None:
    """Refuse a micro-batch that does not divide a rank's share of the batch.

    Raises:
        UserError: that is so.
    """
    size = stage.micro_batch_size
    if size is not None and (size < 1 or rank_batch % size):
        of = "" if rank_batch == stage.batch_size else " a rank"
        raise UserError(
            f"{where}.batch_size is {rank_batch}{of}, no multiple of the micro-batch {size}; "
            f"set {where}.micro_batch_size to a divisor, or to none to have it found"
        )


def _curve(config: RunConfig, index: int) -> Callable[[int], float]:
    """The schedule that begins with a stage and spans those after it that say "continue"."""
    stage, rate = config.stages[index], peak_rate(config, index)
    steps = stage.steps
    for later in config.stages[index + 1 :]:
        if later.schedule != "continue":
            break
        steps += later.steps
    try:
        if stage.schedule == "polynomial":
            return schedules.PolynomialDecay(rate, steps, stage.warmup_steps, power=stage.power)
        if stage.schedule == "triangle":
            return schedules.Triangle(rate, steps, stage.warmup_steps, power=stage.power)
        if stage.schedule == "constant":
            return schedules.Warmup(schedules.Constant(rate), stage.warmup_steps)
    except ValueError as error:
        raise UserError(f"stages.{index}: {error}") from None
    raise UserError(
        f"stages.{index}.schedule is {stage.schedule!r}; it must be polynomial, triangle, constant, "
        "or, after the first stage, continue"
    )


def _rate(curve: Callable[[int], float], offset: int, step: int) -> float:
    return curve(step + offset)
