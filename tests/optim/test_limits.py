"""The identities that the paper and the mathematics promise, each beside a case in which it fails.

Guards the meaning of every switch: ratio 1 is AdamW or SGD exactly, one knob does one thing, and the scale of the
gradient is forgotten. float64, so that "equal" means 1e-12 relative: twenty steps of some ten roundings each.
"""

import pytest
import torch
from optim_cases import BACKENDS, build, give_gradients, largest_difference, layers, run

from largebatch import LAMB, LARS, Layerwise

EQUAL = 1e-12


def after(optimizer_of, steps: int = 20) -> list[torch.Tensor]:
    params = layers()
    run(optimizer_of(params), params, steps)
    return params


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("maximize", [False, True])
def test_lamb_without_its_ratio_is_adamw(backend: str, weight_decay: float, maximize: bool) -> None:
    settings = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": weight_decay, "maximize": maximize}
    adamw = after(lambda params: torch.optim.AdamW(params, **settings))
    assert largest_difference(after(lambda p: LAMB(p, adapt=False, backend=backend, **settings)), adamw) < EQUAL
    assert largest_difference(after(lambda p: LAMB(p, backend=backend, **settings)), adamw) > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_ratio_bounded_to_one_is_adamw(backend: str) -> None:
    settings = {"lr": 1e-2, "eps": 1e-5, "weight_decay": 0.3}
    adamw = after(lambda params: torch.optim.AdamW(params, **settings))
    bounded = after(lambda p: LAMB(p, ratio_bounds=(1.0, 1.0), backend=backend, **settings))
    assert largest_difference(bounded, adamw) < EQUAL


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nesterov", [False, True])
def test_lars_of_2017_without_its_ratio_is_sgd(backend: str, nesterov: bool) -> None:
    settings = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.3, "nesterov": nesterov}
    params, twins = layers(), layers()
    lars = LARS(params, form="2017", adapt=False, backend=backend, **settings)
    sgd = torch.optim.SGD(twins, **settings)
    for optimizer, of in ((lars, params), (sgd, twins)):
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        for step in range(10):
            give_gradients(of, step)
            optimizer.step()
            schedule.step()
    assert largest_difference(params, twins) < EQUAL
    buffers = [lars.state[x]["momentum_buffer"] for x in params]
    assert largest_difference(buffers, [sgd.state[x]["momentum_buffer"] for x in twins]) < EQUAL
    adapted = after(lambda p: LARS(p, form="2017", backend=backend, **settings))
    assert largest_difference(adapted, twins) > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_lars_without_momentum_is_normalised_gradient_descent(backend: str) -> None:
    # β = 0, λ = 0: every layer moves along −g by the share η of its norm; both forms agree.
    x = torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    g = torch.tensor([[0.0, 6.0], [8.0, 0.0]], dtype=torch.float64)
    for form in ("paper", "2017"):
        moved = x.clone().requires_grad_()
        moved.grad = g
        LARS([moved], lr=0.1, momentum=0.0, weight_decay=0.0, form=form, backend=backend).step()
        assert torch.allclose(moved, x - 0.1 * 5 * g / 10, rtol=1e-14, atol=0)
    forms = [
        after(lambda p, f=form: LARS(p, lr=0.1, momentum=0.0, form=f, backend=backend)) for form in ("paper", "2017")
    ]
    assert largest_difference(*forms) > 1e-3  # with decay they differ: ‖g + λx‖ is not ‖g‖ + λ‖x‖


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["lamb", "nnlamb", "lars", "lars2017"])
def test_the_scale_of_the_gradient_is_forgotten(name: str, backend: str) -> None:
    def with_scale(scale: float, **settings: float) -> list[torch.Tensor]:
        params = layers()[:2]
        optimizer = build(name, params, weight_decay=0.0, backend=backend, **settings)
        for step in range(5):
            give_gradients(params, step)
            for x in params:
                x.grad *= scale
            optimizer.step()
        return params

    assert largest_difference(with_scale(1000.0, eps=0.0), with_scale(1.0, eps=0.0)) < EQUAL
    assert largest_difference(with_scale(1000.0, eps=0.1), with_scale(1.0, eps=0.1)) > 1e-6  # what ε is for


@pytest.mark.parametrize("backend", BACKENDS)
def test_b1_b2_zero_is_sign_descent(backend: str) -> None:
    # β₁ = β₂ = ε = λ = 0: u = sign(g), ‖u‖ = √d.
    params = layers()[:1]
    before = params[0].detach().clone()
    give_gradients(params, 0)
    LAMB(params, lr=0.1, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0, backend=backend).step()
    expected = before - 0.1 * before.norm() / before.numel() ** 0.5 * params[0].grad.sign()
    assert torch.allclose(params[0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_decay_zero_turns_off_decay_and_nothing_else(backend: str) -> None:
    # A popular implementation switches the ratio off with the decay; ours has to be asked for that.
    params = layers()
    optimizer = LAMB(params, weight_decay=0.0, backend=backend)
    run(optimizer, params, 1)
    ratios = optimizer.trust_ratios()
    assert float(ratios[0]) != 1
    assert float(ratios[1]) != 1
    asked = layers()
    optimizer = LAMB(asked, weight_decay=0.0, always_adapt=False, backend=backend)
    run(optimizer, asked, 1)
    assert {float(ratio) for ratio in optimizer.trust_ratios().values()} == {1.0}
    decayed = LAMB(asked, weight_decay=0.1, always_adapt=False, backend=backend)
    run(decayed, asked, 1)
    assert float(decayed.trust_ratios()[0]) != 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_adapt_false_turns_off_the_ratio_and_not_the_decay(backend: str) -> None:
    decayed, plain = (after(lambda p, w=w: LAMB(p, adapt=False, weight_decay=w, backend=backend)) for w in (0.5, 0.0))
    assert largest_difference(decayed, plain) > 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_of_an_adapted_layer_is_its_rate_long(backend: str) -> None:
    # ‖Δx‖ = η‖x‖ at the first step: no hidden warm-up, no clamp of ‖x‖ at 10. With "folded" there is a warm-up.
    for correction, expected in ((True, 1.0), (False, 1.0), ("folded", 0.001**0.5 / 0.1)):
        params = layers()[:2]
        optimizer = LAMB(params, lr=1e-3, bias_correction=correction, backend=backend)
        before = [x.detach().clone() for x in params]
        run(optimizer, params, 1)
        for x, old in zip(params, before, strict=True):
            assert float((x.detach() - old).norm() / (1e-3 * old.norm())) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layerwise_adamw_is_lamb_and_layerwise_sgd_is_lars(backend: str) -> None:
    lamb = after(lambda p: LAMB(p, lr=1e-2, eps=1e-5, weight_decay=0.1, backend=backend))
    adamw = after(lambda p: Layerwise(torch.optim.AdamW(p, lr=1e-2, eps=1e-5, weight_decay=0.1)))
    assert largest_difference(adamw, lamb) < 1e-10  # u is a difference of weights there
    assert largest_difference(after(lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-5, weight_decay=0.1)), lamb) > 1e-3
    # SGD's buffer is m/(1 − β) while the gradients' weights agree, and the ratio forgets the factor.
    lars = after(lambda p: LARS(p[:4], lr=1e-2, weight_decay=0.1, backend=backend))
    sgd = after(lambda p: Layerwise(torch.optim.SGD(p[:4], lr=1e-2, momentum=0.9, weight_decay=0.1)))
    assert largest_difference(sgd[:2], lars[:2]) < 1e-10
    assert largest_difference(after(lambda p: torch.optim.SGD(p[:4], lr=1e-2, momentum=0.9))[:2], lars[:2]) > 1e-3
