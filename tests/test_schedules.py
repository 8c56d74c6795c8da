"""Schedules against points computed by hand, the shapes the paper states, and torch's own schedulers.

Rates are ratios and products of a few floats, so a hand-computed point is compared at 1e-12 (a few thousand
roundings of 1.1e-16 would be needed to miss it); where a shape holds exactly, the comparison is exact.
"""

import io
import math
import pickle
from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from largebatch import schedules
from largebatch.schedules import Constant, Piecewise, PolynomialDecay, Schedule, Stages, Triangle, Warmup, goyal

CLOSE = 1e-12

POINTS: list[tuple[Schedule, dict[int, float]]] = [
    (Constant(0.3), {0: 0.3, 10**9: 0.3}),
    # The paper's 32K run: 0.005 * t / 3125, then 0.005 * (1 - t / 15625).
    (
        PolynomialDecay(0.005, 15_625, 3_125),
        {0: 0.0, 1: 1.6e-6, 3_124: 0.0049984, 3_125: 0.004, 7_000: 0.00276, 15_624: 3.2e-7, 15_625: 0.0, 20_000: 0.0},
    ),
    # NVIDIA's first phase, power 0.5: 6e-3 * sqrt(1 - 2000 / 7038) = 5.0765e-3.
    (PolynomialDecay(6e-3, 7_038, 2_000, 0.5), {1_000: 3e-3, 2_000: 6e-3 * math.sqrt(5_038 / 7_038), 7_038: 0.0}),
    (PolynomialDecay(1.0, 10, 0, 2.0), {0: 1.0, 5: 0.25, 9: 0.01}),
    (PolynomialDecay(1.0, 10, 0, 1.0, end_learning_rate=0.2), {0: 1.0, 5: 0.6, 10: 0.2, 99: 0.2}),
    # Re-warm-up on the whole-run form: the decay up to the hook, the ramp to the full rate, the decay again.
    (PolynomialDecay(1.0, 10, 2, start_warmup_step=4), {0: 1.0, 3: 0.7, 4: 0.0, 5: 0.5, 6: 0.4, 9: 0.1}),
    # A negative hook begins part-way up the ramp.
    (PolynomialDecay(1.0, 10, 4, start_warmup_step=-1), {0: 0.25, 2: 0.75, 3: 0.7}),
    # ImageNet at 32K: up to 0.04 over 782 steps, down over the 2,737 that remain.
    (
        Triangle(0.04, 3_519, 782),
        {0: 0.0, 391: 0.02, 782: 0.04, 783: 0.04 * 2_736 / 2_737, 3_518: 0.04 / 2_737, 3_519: 0.0, 9_999: 0.0},
    ),
    (Triangle(1.0, 12, 2, 2.0, end_learning_rate=0.5), {2: 1.0, 7: 0.5 + 0.5 * 0.25, 12: 0.5}),
    (Warmup(Constant(2.0), 4, start_learning_rate=1.0), {0: 1.0, 1: 1.25, 3: 1.75, 4: 2.0}),
    (Warmup(Constant(2.0), 0), {0: 2.0}),
    (Warmup(Constant(2.0), 4), {0: 0.0, 2: 1.0, 4: 2.0}),
    # What is left out, and the shortest runs that are accepted.
    (PolynomialDecay(1.0, 10), {0: 1.0, 9: 0.1}),
    (PolynomialDecay(1.0, 10, 10), {9: 0.9, 10: 0.0}),
    (PolynomialDecay(1.0, 1), {0: 1.0, 1: 0.0}),
    (Triangle(1.0, 10), {0: 1.0, 9: 0.1}),
    (Triangle(1.0, 1), {0: 1.0, 1: 0.0}),
    (Piecewise(1.0, (1, 2)), {0: 1.0, 1: 0.1, 2: 0.01}),
    (goyal(1.0, 1), {0: 0.0, 1: 0.2, 5: 1.0, 29: 1.0, 30: 0.1, 60: 0.01, 80: 0.001}),
    (goyal(1.0, 1, warmup_epochs=0), {0: 1.0}),
    (Piecewise(8.0, (2, 5, 7), 0.5), {0: 8.0, 1: 8.0, 2: 4.0, 4: 4.0, 5: 2.0, 7: 1.0, 70: 1.0}),
    # Goyal at 8K: 156 updates an epoch, x0.1 at epochs 30, 60, 80, from 0.1 up to 3.2 in 5 epochs.
    (
        goyal(3.2, 156, start_learning_rate=0.1),
        {0: 0.1, 390: 1.65, 780: 3.2, 4_679: 3.2, 4_680: 0.32, 9_360: 0.032, 12_480: 0.0032},
    ),
    (
        Stages(((PolynomialDecay(6e-3, 7_037, 2_000, 0.5), 7_037), (PolynomialDecay(4e-3, 1_562, 200, 0.5), 1_562))),
        {
            7_036: 6e-3 * math.sqrt(1 / 7_037),
            7_037: 0.0,
            7_137: 2e-3,
            7_237: 4e-3 * math.sqrt(1_362 / 1_562),
            8_598: 4e-3 * math.sqrt(1 / 1_562),
            8_599: 0.0,
            10_000: 0.0,
        },
    ),
]
SCHEDULES = [schedule for schedule, _ in POINTS]


@pytest.mark.parametrize(("schedule", "points"), POINTS, ids=lambda value: type(value).__name__)
def test_points_computed_by_hand(schedule: Schedule, points: dict[int, float]) -> None:
    for step, rate in points.items():
        assert schedule(step) == pytest.approx(rate, rel=CLOSE, abs=1e-18), step


def test_the_rate_drops_at_the_end_of_the_whole_run_forms_warmup() -> None:
    """PAPER: 0.005 -> 0.004 in the 32K run; the drop is warmup / T of the peak, and the triangle has none."""
    whole_run, triangle = PolynomialDecay(0.005, 15_625, 3_125), Triangle(0.005, 15_625, 3_125)
    assert whole_run(3_124) == pytest.approx(0.005 * 3_124 / 3_125, rel=CLOSE)
    assert whole_run(3_125) == pytest.approx(0.004, rel=CLOSE)
    jumps = [abs(triangle(step + 1) - triangle(step)) for step in range(15_625)]
    assert max(jumps) <= 0.005 / 3_125 * (1 + 1e-9)  # nowhere more than one step of the ramp
    assert max(abs(whole_run(step + 1) - whole_run(step)) for step in range(15_625)) > 500 * max(jumps)


@given(
    peak=st.floats(1e-6, 10),
    total=st.integers(2, 10_000),
    warmup=st.floats(0, 0.99),
    power=st.floats(0.25, 4),
    step=st.integers(0, 12_000),
    triangle=st.booleans(),
)
def test_rates_stay_between_zero_and_the_peak_and_fall_after_the_warmup(
    peak: float, total: int, warmup: float, power: float, step: int, triangle: bool
) -> None:
    warmup_steps = int(warmup * total)
    schedule = (Triangle if triangle else PolynomialDecay)(peak, total, warmup_steps, power)
    assert 0 <= schedule(step) <= peak
    if step < warmup_steps - 1:
        assert schedule(step) < schedule(step + 1)
    elif warmup_steps <= step < total:
        assert schedule(step) > schedule(step + 1)
    elif step >= total:
        assert schedule(step) == 0


@given(total=st.integers(2, 5_000), step=st.integers(0, 6_000), power=st.floats(0.25, 4), end=st.floats(0, 1))
def test_without_warmup_both_forms_are_the_same_curve(total: int, step: int, power: float, end: float) -> None:
    whole_run, triangle = PolynomialDecay(1.5, total, 0, power, end), Triangle(1.5, total, 0, power, end)
    assert whole_run(step) == triangle(step)


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=5), step=st.integers(0, 300))
def test_a_stage_counts_from_its_own_boundary(lengths: list[int], step: int) -> None:
    parts = [(Triangle(1.0 + i, length + 1, length // 2), length) for i, length in enumerate(lengths)]
    stages = Stages(tuple(parts))
    flat = [schedule(local) for schedule, length in parts for local in range(length)]
    assert stages.total_steps == len(flat)
    if step < len(flat):
        assert stages(step) == flat[step]
        index, local = stages.locate(step)
        assert sum(lengths[:index]) + local == step
        assert local < lengths[index]
    else:
        assert stages(step) == parts[-1][0](step - sum(lengths[:-1]))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_schedules_are_values(schedule: Schedule) -> None:
    """Printed, rebuilt from the print, pickled, compared, hashed; and not to be changed."""
    assert eval(repr(schedule), vars(schedules)) == schedule
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert hash(schedule) == hash(pickle.loads(pickle.dumps(schedule)))
    assert schedule != Constant(123.0)
    with pytest.raises(FrozenInstanceError):
        schedule.learning_rate = 1.0  # type: ignore[attr-defined]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda value: type(value).__name__)
def test_as_factor_drives_lambda_lr(schedule: Schedule) -> None:
    """The rate of update t under LambdaLR is schedule(t), to the two roundings of dividing and multiplying back."""
    base_lr = 0.7
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base_lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.as_factor(base_lr))
    for step in range(25):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(schedule(step), rel=4e-16, abs=0)
        optimizer.step()
        scheduler.step()


def test_lambda_lr_saves_and_resumes_with_a_factor() -> None:
    def build() -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        factor = Triangle(1.0, 20, 4).as_factor(1.0)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, pickle.loads(pickle.dumps(factor)))

    optimizer, scheduler = build()
    for _ in range(7):
        optimizer.step()
        scheduler.step()
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    optimizer, scheduler = build()
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == Triangle(1.0, 20, 4)(8)


def test_multistep_and_polynomial_agree_with_torch() -> None:
    """Two curves that torch has too, from another hand."""
    pairs = [
        (Piecewise(0.4, (3, 7), 0.2), lambda opt: torch.optim.lr_scheduler.MultiStepLR(opt, [3, 7], 0.2)),
        (PolynomialDecay(0.4, 12, 0, 0.5), lambda opt: torch.optim.lr_scheduler.PolynomialLR(opt, 12, 0.5)),
    ]
    for schedule, build in pairs:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
        scheduler = build(optimizer)
        for step in range(15):
            # torch multiplies step by step: at most 15 products of two roundings each
            assert optimizer.param_groups[0]["lr"] == pytest.approx(schedule(step), rel=1e-14, abs=1e-15)
            optimizer.step()
            scheduler.step()


NAN, INF = float("nan"), float("inf")
BAD = [
    (lambda: Constant(-0.1), r"learning_rate must be in \[0, inf\), got -0.1"),
    (lambda: Constant(NAN), r"learning_rate .* got nan"),
    (lambda: Constant(0.1)(-1), r"step must be an integer in \[0, inf\], got -1"),
    (lambda: Constant(0.1)(1.5), r"step must be an integer .* got 1.5"),
    (lambda: PolynomialDecay(0.1, 0), r"total_steps must be an integer in \[1, inf\], got 0"),
    (lambda: PolynomialDecay(0.1, 10, 11), r"warmup_steps .* \[0, 10 = total_steps\], got 11"),
    (lambda: PolynomialDecay(0.1, 10, -1), r"warmup_steps .* got -1"),
    (lambda: PolynomialDecay(0.1, 10, 2, 0.0), r"power must be in \(0, inf\), got 0.0"),
    (lambda: PolynomialDecay(0.1, 10, 2, INF), r"power .* got inf"),
    (lambda: PolynomialDecay(INF, 10), r"learning_rate .* got inf"),
    (lambda: PolynomialDecay(0.1, 10, 2, 1.0, -0.1), r"end_learning_rate .* got -0.1"),
    (lambda: PolynomialDecay(0.1, 10, 2, start_warmup_step=9), r"start_warmup_step .* 8 = total_steps - warmup_steps"),
    (lambda: Triangle(0.1, 10, 10), r"warmup_steps .* \[0, 9 = total_steps - 1\], got 10"),
    (lambda: Triangle(0.1, 10, 2, -1.0), r"power .* got -1.0"),
    (lambda: Triangle(-1.0, 10), r"learning_rate .* got -1.0"),
    (lambda: Triangle(1.0, 10, 2, 1.0, NAN), r"end_learning_rate .* got nan"),
    (lambda: Triangle(1.0, 10.5), r"total_steps must be an integer .* got 10.5"),
    (lambda: Warmup(Constant(1.0), -1), r"warmup_steps .* got -1"),
    (lambda: Warmup(Constant(1.0), 1, -1.0), r"start_learning_rate .* got -1.0"),
    (lambda: Piecewise(1.0, (5, 5)), r"milestones: each must be an integer in \[6, inf\], got 5"),
    (lambda: Piecewise(1.0, (0,)), r"milestones: each .* got 0"),
    (lambda: Piecewise(1.0, (1,), -0.5), r"gamma .* got -0.5"),
    (lambda: Stages(()), r"stages must hold at least one"),
    (lambda: Stages(((Constant(1.0), 0),)), r"stages\[0\]: steps .* got 0"),
    (lambda: goyal(1.0, 0), r"steps_per_epoch .* got 0"),
    (lambda: goyal(1.0, 10, warmup_epochs=-1), r"warmup_epochs .* got -1"),
    (lambda: Constant(0.1).as_factor(0.0), r"base_lr must be in \(0, inf\), got 0.0"),
]


@pytest.mark.parametrize(("build", "message"), BAD, ids=[message for _, message in BAD])
def test_an_error_names_argument_value_and_range(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()  # type: ignore[operator]
