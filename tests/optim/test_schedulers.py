"""Learning-rate schedulers, averaged models and gradient scalers of torch, around our optimizers.

Guards that the rate a scheduler writes is the rate of the step, whether it writes a number or fills a tensor. The
measure is ours alone: an adapted layer without decay moves by exactly the share η of its norm, so every step tells the
rate it was taken with.
"""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from optim_cases import give_gradients, layers
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler, swa_utils

from largebatch import LAMB, LARS, NLAMB, Layerwise

MAKERS: dict[str, Callable[..., Optimizer]] = {
    "lamb": lambda params, lr=0.05: LAMB(params, lr=lr, weight_decay=0.0),
    "lamb-tensor": lambda params, lr=0.05: LAMB(params, lr=torch.tensor(lr, dtype=torch.float64), weight_decay=0.0),
    "nlamb": lambda params, lr=0.05: NLAMB(params, lr=lr, weight_decay=0.0),
    "lars": lambda params, lr=0.05: LARS(params, lr=lr, weight_decay=0.0),
    "layerwise": lambda params, lr=0.05: Layerwise(torch.optim.Adam(params, lr=lr)),
}
every_optimizer = pytest.mark.parametrize("name", list(MAKERS))

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "step": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [2, 4], gamma=0.5),
    "constant": lambda o: lr_scheduler.ConstantLR(o, factor=0.3, total_iters=3),
    "linear": lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=4),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, total_iters=6, power=2.0),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=6),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2, cycle_momentum=False),
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8, cycle_momentum=False),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, factor=0.3, total_iters=3), lr_scheduler.ExponentialLR(o, 0.8)]
    ),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=3), lr_scheduler.PolynomialLR(o, total_iters=4)],
        milestones=[3],
    ),
    "swa": lambda o: swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=3),
}


def rates_taken(optimizer: Optimizer, params: list[Tensor], steps: int, first: int = 0) -> Iterator[list[float]]:
    """Take steps, and yield the share of its norm that each layer moved by."""
    for step in range(first, first + steps):
        before = [x.detach().clone() for x in params]
        give_gradients(params, step)
        optimizer.step()
        yield [float((x.detach() - old).norm() / old.norm()) for x, old in zip(params, before, strict=True)]


@every_optimizer
@pytest.mark.parametrize("schedule", list(SCHEDULERS))
def test_every_step_is_as_long_as_the_scheduler_says(name: str, schedule: str) -> None:
    params, reference = layers()[:2], [torch.ones(1, requires_grad=True)]
    optimizer = MAKERS[name](params)
    plain = torch.optim.SGD(reference, lr=0.05)  # whose rates nobody doubts
    scheduler, expected = SCHEDULERS[schedule](optimizer), SCHEDULERS[schedule](plain)
    seen = set()
    for taken in rates_taken(optimizer, params, 7):
        rate = plain.param_groups[0]["lr"]
        # The u of Layerwise is a difference of weights, of which some are near 300 in float64: 300·1e-16/1e-6.
        assert taken == pytest.approx([rate, rate], rel=1e-8, abs=1e-15)
        seen.add(round(rate, 12))
        plain.step()
        scheduler.step()
        expected.step()
    assert len(seen) > 1, "the schedule never changed the rate"
    assert isinstance(optimizer.param_groups[0]["lr"], Tensor) == (name == "lamb-tensor")


@every_optimizer
def test_plateaus(name: str) -> None:
    params = layers()[:2]
    optimizer = MAKERS[name](params)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
    taken = []
    for shares, loss in zip(rates_taken(optimizer, params, 6), (3.0, 2.0, 2.0, 2.0, 2.0, 2.0), strict=True):
        taken.append(shares[0])
        scheduler.step(loss)
    assert taken == pytest.approx([0.05, 0.05, 0.05, 0.05, 0.025, 0.025], rel=1e-8)


@pytest.mark.parametrize("name", ["lamb", "nlamb", "lars", "layerwise"])
@pytest.mark.parametrize("schedule", ["one-cycle", "cyclic"])
def test_momentum_cycles_against_the_rate(name: str, schedule: str) -> None:
    params = layers()[:2]
    optimizer = MAKERS[name](params)
    scheduler = (
        lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=6, base_momentum=0.8, max_momentum=0.9)
        if schedule == "one-cycle"
        else lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=2, base_momentum=0.8, max_momentum=0.9)
    )
    momenta = []
    for _ in rates_taken(optimizer, params, 5):
        group = optimizer.param_groups[0]
        momenta.append(group["betas"][0] if "betas" in group else group["momentum"])
        scheduler.step()
    assert min(momenta) == pytest.approx(0.8, rel=1e-3)
    assert max(momenta) == pytest.approx(0.9)
    # The momentum that the scheduler set is what the averages were made with.
    expected = 0.0
    for step, momentum in enumerate(momenta):
        give_gradients(params, step)
        expected = momentum * expected + (1 - momentum) * params[0].grad
    average = optimizer.state[params[0]]["exp_avg" if "betas" in optimizer.param_groups[0] else "momentum_buffer"]
    assert torch.allclose(average, expected, rtol=1e-12)


@every_optimizer
def test_optimizer_and_scheduler_resume_bit_for_bit(name: str) -> None:
    def made(params: list[Tensor]) -> tuple[Optimizer, Any]:
        optimizer = MAKERS[name](params)
        return optimizer, SCHEDULERS["sequential"](optimizer)

    params = layers()[:3]
    optimizer, scheduler = made(params)

    def train(optimizer: Optimizer, scheduler: Any, params: list[Tensor], first: int) -> None:
        for step in range(first, first + 3):
            give_gradients(params, step)
            optimizer.step()
            scheduler.step()

    train(optimizer, scheduler, params, 0)
    resumed = copy.deepcopy(params)
    again, its_scheduler = made(resumed)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    its_scheduler.load_state_dict(scheduler.state_dict())
    train(optimizer, scheduler, params, 3)
    train(again, its_scheduler, resumed, 3)
    assert all(torch.equal(x, y) for x, y in zip(params, resumed, strict=True))
    assert optimizer.param_groups[0]["lr"] == again.param_groups[0]["lr"]


@every_optimizer
def test_averaged_models(name: str) -> None:
    # An average of weights is not of the optimizer's doing; it must only see every step.
    model = nn.Linear(6, 3)
    optimizer = MAKERS[name](model.parameters())
    swa = swa_utils.AveragedModel(model)
    ema = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
    history = []
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(5, 6)).square().sum().backward()
        optimizer.step()
        swa.update_parameters(model)
        ema.update_parameters(model)
        history.append(model.weight.detach().clone())
    torch.testing.assert_close(swa.module.weight.detach(), torch.stack(history).mean(0))
    expected = history[0]
    for weight in history[1:]:
        expected = 0.5 * expected + 0.5 * weight
    torch.testing.assert_close(ema.module.weight.detach(), expected)
    assert not torch.equal(history[0], history[-1])


# ---- the gradient scaler ----


def scaled_steps(
    name: str, scaler: torch.amp.GradScaler, bad_step: int | None = None, clip: float | None = None
) -> tuple[nn.Module, Optimizer, list[bool]]:
    """Train for four steps under a scaler, with an inf in the gradient of ``bad_step``; say which steps moved."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = MAKERS[name](model.parameters())
    moved = []
    for step in range(4):
        before = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(5, 6)).square().sum()).backward()
        if step == bad_step:
            model[0].weight.grad[0, 0] = math.inf
        if clip is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        moved.append(any(not torch.equal(x, before[key]) for key, x in model.state_dict().items()))
    return model, optimizer, moved


@every_optimizer
@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_scaled_run_is_the_plain_run(name: str, clip: float | None) -> None:
    # The scale is a power of two, so that scaling and unscaling are exact.
    scaled, _, _ = scaled_steps(name, torch.amp.GradScaler("cpu", init_scale=2.0**10), clip=clip)
    plain, _, _ = scaled_steps(name, torch.amp.GradScaler("cpu", enabled=False), clip=clip)
    assert all(torch.equal(x, y) for x, y in zip(scaled.parameters(), plain.parameters(), strict=True))


@every_optimizer
def test_the_scaler_skips_the_whole_step_of_an_inf(name: str) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    _, optimizer, moved = scaled_steps(name, scaler, bad_step=1)
    assert moved == [True, False, True, True]
    assert scaler.get_scale() == 2.0**9
    for state in optimizer.state.values():
        assert float(state.get("step", 3)) == 3
        assert all(bool(value.isfinite().all()) for value in state.values())


@every_optimizer
def test_float16_autocast_under_a_scaler_trains(name: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer, scaler = MAKERS[name](model.parameters()), torch.amp.GradScaler("cpu")
    inputs, targets = torch.randn(64, 6), torch.randn(64, 3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = (model(inputs) - targets).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
