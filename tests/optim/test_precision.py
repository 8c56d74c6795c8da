"""State in bfloat16 and master weights in float32: what they save, and that nothing is lost in the rounding.

Guards against a state that stands still, since β₂ = 0.999 moves v by less than bfloat16 can tell apart, and against
bfloat16 weights that a small rate never moves. The companions are the same runs rounded to the nearest, and without
the master copy.
"""

import copy
import io
from typing import Any

import pytest
import torch
from optim_cases import FLOAT32_BACKENDS, give_gradients, layers, run
from torch import Tensor

from largebatch import LAMB, NNLAMB
from largebatch.optim import foreach, precision

HALF_UNIT = 2.0**-8  # bfloat16: to the nearest number of it, at most this part of a number is rounded off


def rounded(values: Tensor, step: int, **settings: Any) -> Tensor:
    return precision.round_stochastically(values, precision.seed_of(step, 3), **settings)


def nearest(target: Tensor, value: Tensor, *_: Any, **__: Any) -> None:
    target.copy_(value)


# ---- the rounding ----


def test_rounding_is_unbiased_and_to_a_neighbour() -> None:
    # 2,000 numbers of all exponents, rounded in 2,048 steps. Up or down by chance deviates by half a gap at most, its
    # mean by 0.011 of one, and five of those hold for all 2,000 with a probability of 0.999.
    values = torch.randn(2000) * 10.0 ** torch.randint(-30, 30, (2000,))
    down = (values.view(torch.int32) & -0x10000).view(torch.float32)
    up = ((values.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    gap = (up - down).double()
    total = torch.zeros(2000, dtype=torch.float64)
    for step in range(2048):
        result = rounded(values, step)
        assert bool(((result == down) | (result == up)).all())
        total += (result.double() - down.double()) / gap
    bias = total / 2048 - (values.double() - down.double()) / gap
    assert float(bias.abs().max()) < 5 * 0.5 / 2048**0.5
    to_nearest = (values.bfloat16().double() - down.double()) / gap - (values.double() - down.double()) / gap
    assert float(to_nearest.abs().max()) > 0.4


def test_the_noise_is_of_the_step_the_layer_the_state_and_the_element() -> None:
    values = torch.full((4096,), 1.0 + 2**-8)  # half way between two neighbours
    ups = {
        "a step": rounded(values, 1) > 1,
        "the next": rounded(values, 2) > 1,
        "another layer": precision.round_stochastically(values, precision.seed_of(1, 4)) > 1,
        "the other state": rounded(values, 1, state=1) > 1,
        "further on": rounded(values, 1, first=4096) > 1,
    }
    for name, up in ups.items():
        # Fair and independent coins: 4,096 of them deviate by 32 (one σ), agree in half of the cases, as do neighbours.
        assert abs(int(up.sum()) - 2048) < 5 * 32, name
        assert abs(int((up[1:] == up[:-1]).sum()) - 2048) < 5 * 32, name
        for other, its in ups.items():
            assert name == other or abs(int((up == its).sum()) - 2048) < 5 * 32, (name, other)
    assert torch.equal(rounded(values, 1), rounded(values, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_noise_of_a_step_is_its_own_whatever_the_default_dtype(dtype: torch.dtype) -> None:
    expected = [int(precision.seed_of(t, 3)) for t in (1000, 1001, 70_001)]
    try:
        torch.set_default_dtype(dtype)
        assert [int(precision.seed_of(t, 3)) for t in (1000, 1001, 70_001)] == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_bfloat16_holds_is_left_alone_and_what_is_not_finite_stays_so() -> None:
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, 2.0**-130, 3.0e38]).bfloat16().float()
    special = torch.tensor([float("inf"), float("-inf"), float("nan")])
    for step in range(50):
        assert torch.equal(rounded(exact, step), exact)
        assert torch.equal(rounded(special, step).nan_to_num(7.0), special.nan_to_num(7.0))


# ---- state in bfloat16 ----


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS[1:])  # the reference's rounding is foreach's, and it is slow
def test_averages_follow_where_rounding_to_the_nearest_stands_still(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # After one gradient of 10, gradients of 0.1: v must come down from 0.1 to 0.01 + 0.09·0.999^400 = 0.07.
    def v_after(state_dtype: torch.dtype | None) -> Tensor:
        x = torch.ones(256, requires_grad=True)
        optimizer = LAMB([x], lr=0.0, state_dtype=state_dtype, backend=backend)
        x.grad = torch.full((256,), 10.0)
        optimizer.step()
        x.grad = torch.full((256,), 0.1)
        for _ in range(400):
            optimizer.step()
        return optimizer.state[x]["exp_avg_sq"].double()

    expected = v_after(None)
    stochastic = v_after(torch.bfloat16)
    # A step of −0.1% goes down a unit of 0.4 to 0.8% with the probability 0.13 to 0.26: the deviation is 0.2%. Of
    # 400 steps that is 4% for one element, and 0.3% for the mean of 256.
    assert float((stochastic / expected - 1).std()) < 0.06
    assert float((stochastic.mean() / expected.mean() - 1).abs()) < 5 * 0.003
    if backend == "native":  # whose rounding is in C, and the same
        return
    monkeypatch.setattr(foreach, "store", nearest)
    frozen = v_after(torch.bfloat16)
    assert float(frozen.mean() / expected.mean()) > 1.3


def test_a_run_with_bfloat16_state_learns_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    # Least squares with inputs of very different scales, at a decaying rate; three seeds.
    def final_loss(seed: int, state_dtype: torch.dtype | None) -> float:
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(256, 32, generator=generator) * torch.logspace(-1, 1, 32)
        target = inputs @ torch.randn(32, 8, generator=generator)
        x = torch.randn(32, 8, generator=generator).requires_grad_()
        optimizer = LAMB([x], lr=0.05, weight_decay=0.0, state_dtype=state_dtype)
        schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=200)
        for _ in range(200):
            batch = torch.randint(256, (32,), generator=generator)
            loss = (inputs[batch] @ x - target[batch]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return float((inputs @ x.detach() - target).square().mean())

    exact = torch.tensor([final_loss(seed, None) for seed in range(3)])
    narrow = torch.tensor([final_loss(seed, torch.bfloat16) for seed in range(3)])
    assert abs(float(narrow.mean() / exact.mean()) - 1) < 0.1
    assert float(exact.max()) < 10, "about 1,000 at the start"


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
def test_bfloat16_state_takes_half_the_memory(backend: str) -> None:
    def size(state_dtype: torch.dtype | None) -> int:
        params = layers(torch.float32)
        optimizer = LAMB(params, backend=backend, state_dtype=state_dtype)
        run(optimizer, params, 1)
        states = (optimizer.state[x] for x in params)
        return sum(state[key].nbytes for state in states for key in ("exp_avg", "exp_avg_sq"))

    assert size(torch.bfloat16) * 2 == size(None)


# ---- master weights ----


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_master_weights_are_a_float32_run(dtype: torch.dtype, backend: str) -> None:
    params = [x for x in layers(dtype) if x.numel()]
    twins = [x.detach().float().requires_grad_() for x in params]
    optimizer = LAMB(params, lr=1e-4, backend=backend, master_weights=True)
    wide = LAMB(twins, lr=1e-4, backend=backend)
    without = [x.detach().clone().requires_grad_() for x in params]
    plain = LAMB(without, lr=1e-4, backend=backend)
    for step in range(10):
        give_gradients(params, step)
        for x, twin, other in zip(params, twins, without, strict=True):
            twin.grad, other.grad = x.grad.float(), x.grad.clone()
        for of in (optimizer, wide, plain):
            of.step()
    for x, twin in zip(params, twins, strict=True):
        assert torch.equal(optimizer.state[x]["master_param"], twin)
        assert torch.equal(x, twin.to(dtype))
    if dtype is torch.bfloat16:  # in which a step of 1e-4 of the norm is less than half a unit as a rule, and lost
        start = layers(dtype)[0]
        moved, lost = (float((x.detach() != start).float().mean()) for x in (params[0], without[0]))
        assert moved > 1.5 * lost


def test_only_narrow_weights_have_a_master_copy() -> None:
    params = [
        torch.ones(3, dtype=dtype, requires_grad=True) for dtype in (torch.float32, torch.float64, torch.bfloat16)
    ]
    optimizer = LAMB(params, master_weights=True)
    run(optimizer, params, 1)
    assert ["master_param" in optimizer.state[x] for x in params] == [False, False, True]


# ---- resuming ----

NARROW = [{"state_dtype": torch.bfloat16}, {"master_weights": True}]
NARROW.append(NARROW[0] | NARROW[1])


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
@pytest.mark.parametrize("make", [LAMB, NNLAMB])
@pytest.mark.parametrize(
    "settings",
    [
        {"state_dtype": torch.bfloat16},
        {"master_weights": True},
        {"state_dtype": torch.bfloat16, "master_weights": True},
    ],
    ids=str,
)
def test_a_saved_run_goes_on_bit_for_bit(settings: dict[str, Any], make: type[LAMB], backend: str) -> None:
    params = layers(torch.bfloat16)
    optimizer = make(params, lr=0.01, backend=backend, **settings)
    run(optimizer, params, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = copy.deepcopy(params)
    again = make(resumed, lr=0.5, backend=backend, **settings)
    again.load_state_dict(torch.load(file, weights_only=True))
    run(optimizer, params, 3, first=3)
    run(again, resumed, 3, first=3)
    for x, y in zip(params, resumed, strict=True):
        assert torch.equal(x, y)
        for key, value in optimizer.state[x].items():
            assert value.dtype == again.state[y][key].dtype
            assert torch.equal(value, again.state[y][key])


def test_float32_state_loads_into_bfloat16_and_back() -> None:
    params = layers(torch.float32)
    wide, narrow = LAMB(params), LAMB(params, state_dtype=torch.bfloat16)
    run(wide, params, 2)
    narrow.load_state_dict(wide.state_dict())
    for x in params:
        exact, held = wide.state[x]["exp_avg"], narrow.state[x]["exp_avg"]
        assert held.dtype is torch.bfloat16
        assert bool(((held.float() - exact).abs() <= HALF_UNIT * exact.abs()).all())
    wide.load_state_dict(narrow.state_dict())
    assert wide.state[params[0]]["exp_avg"].dtype is torch.float32
    run(narrow, params, 1)
