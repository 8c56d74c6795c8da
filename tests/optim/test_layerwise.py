"""`Layerwise` around torch's optimizers, and around a user's: the base's direction, at a length the layer sets.

Guards the general strategy itself, for every base at once: each step is the base's own step, rescaled to η·‖x‖, and the
base's state is what it would be alone. The two bases that have a closed form here are held to it: AdamW is LAMB, and a
user's sign descent moves every element by η·‖x‖/√n.
"""

import copy
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
from optim_cases import give_gradients, largest_difference, layers, run
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from largebatch import LAMB, LARS, Layerwise, param_groups
from largebatch.optim import CPUOffload


class Lion(Optimizer):
    """A user's own: the sign of an interpolated momentum (Chen et al. 2023), with decoupled decay."""

    def __init__(
        self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for x in group["params"]:
                if x.grad is not None:
                    state = self.state[x]
                    m = state.setdefault("exp_avg", torch.zeros_like(x))
                    x.mul_(1 - lr * group["weight_decay"])
                    x.sub_(lr * (beta1 * m + (1 - beta1) * x.grad).sign())
                    m.lerp_(x.grad, 1 - beta2)
        return loss


BASES: dict[str, Callable[..., Optimizer]] = {
    "SGD": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": torch.optim.Adam,
    "AdamW": lambda params, lr: torch.optim.AdamW(params, lr=lr, weight_decay=0.1),
    "Adamax": torch.optim.Adamax,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "RMSprop": lambda params, lr: torch.optim.RMSprop(params, lr=lr, momentum=0.9, centered=True),
    "Adagrad": lambda params, lr: torch.optim.Adagrad(params, lr=lr, lr_decay=0.1),
    "Adadelta": torch.optim.Adadelta,
    "Muon": lambda params, lr: torch.optim.Muon(params, lr=lr, weight_decay=0.1),
    "Lion": lambda params, lr: Lion(params, lr=lr, weight_decay=0.1),
}


def matrices() -> list[Tensor]:
    return [layers()[0], layers()[6]]


@pytest.mark.parametrize("name", list(BASES))
def test_every_step_is_the_bases_own_at_another_length(name: str) -> None:
    params = matrices()
    optimizer = Layerwise(BASES[name](params, lr=0.02))
    for step in range(4):
        twins = [x.detach().clone().requires_grad_() for x in params]
        base = BASES[name](twins, lr=1e-3)
        state = copy.deepcopy(optimizer.state_dict()["state"])
        base.load_state_dict({**base.state_dict(), "state": state})
        before = [x.detach().clone() for x in params]
        for of in (params, twins):
            give_gradients(of, step)
        optimizer.step()
        base.step()
        for x, twin, old in zip(params, twins, before, strict=True):
            ours, its = x.detach() - old, twin.detach() - old
            assert float(ours.norm() / old.norm()) == pytest.approx(0.02, rel=1e-9)
            # Differences of weights of order 1 in float64, of which the smaller step is 1e-3 to 1e-6 long.
            assert torch.allclose(ours / ours.norm(), its / its.norm(), rtol=0, atol=1e-8)
            for key, value in base.state[twin].items():
                # NAdam's product of momenta is a float32 that torch loads as a float64.
                torch.testing.assert_close(value, optimizer.state[x][key], rtol=1e-6, atol=0, check_dtype=False)


def test_what_is_not_linear_in_its_rate_is_refused() -> None:
    for base in (torch.optim.LBFGS, torch.optim.ASGD, torch.optim.Rprop, torch.optim.Adafactor):
        with pytest.raises(
            ValueError, match=f"base='{base.__name__}': expected an optimizer linear in its learning rate"
        ):
            Layerwise(base(matrices(), lr=0.1))
    with pytest.raises(ValueError, match=r"base='list': expected a torch\.optim\.Optimizer"):
        Layerwise(matrices())


@pytest.mark.parametrize(("name", "ratio"), [("l2", None), ("l1", (0.5, 2.0)), ("linf", torch.sqrt)])
def test_adamw_is_lamb_in_every_setting(name: str, ratio: Any) -> None:
    def groups(params: list[Tensor]) -> list[dict[str, Any]]:
        return [{"params": params[:3]}, {"params": params[3:], "adapt": False, "weight_decay": 0.0}]

    settings = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.3}
    params, twins, plain = layers(), layers(), layers()
    lamb = LAMB(groups(params), norm=name, phi=ratio, **settings)
    ours = Layerwise(torch.optim.AdamW(groups(twins), **settings), norm=name, phi=ratio)
    adamw = torch.optim.AdamW(plain, **settings)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(of, 0.9) for of in (lamb, ours)]
    for step in range(20):
        for optimizer, of in ((lamb, params), (ours, twins), (adamw, plain)):
            run(optimizer, of, 1, first=step)
        for scheduler in schedulers:
            scheduler.step()
    # u is a difference of weights in float64: 1e-16 of weights up to 300, over a u of order 1, twenty times.
    assert largest_difference(twins, params) < 1e-11
    assert largest_difference(plain, params) > 1e-2
    for key, expected in lamb.trust_ratios().items():
        assert float(ours.trust_ratios()[key]) == pytest.approx(float(expected), rel=1e-9)
    for x, y in zip(params, twins, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert largest_difference([ours.state[y][key]], [lamb.state[x][key]]) < 1e-13 if x.numel() else True


def test_adamw_is_lamb_in_float32_to_the_rounding_of_a_difference_of_weights() -> None:
    # 20 steps of u ± 6e-8·max(|x|, |u|) each, for layers whose u and x are within a factor of 10^2.
    params, twins = (layers(torch.float32)[:1] for _ in range(2))
    run(LAMB(params, lr=0.01, weight_decay=0.1), params, 20)
    run(Layerwise(torch.optim.AdamW(twins, lr=0.01, eps=1e-6, weight_decay=0.1)), twins, 20)
    assert 0 < largest_difference(twins, params) < 1e-4


def test_a_users_sign_descent_moves_every_element_alike() -> None:
    x = torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64, requires_grad=True)
    optimizer = Layerwise(Lion([("weight", x)]))
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    x.grad = torch.tensor([[1.0, -2.0], [0.5, 1e-9]], dtype=torch.float64)
    expected = x.detach() - 0.1 * 5.0 / 2.0 * x.grad.sign()
    optimizer.step()
    assert torch.allclose(x, expected, rtol=1e-14, atol=0)
    assert float(optimizer.trust_ratios()["weight"]) == pytest.approx(2.5)


def test_sgd_is_lars_from_the_first_step() -> None:
    # torch seeds its buffer with the whole first gradient, 1/(1 − β) times ours: the ratio forgets the factor only
    # where it is the same for all steps, hence no dampening.
    params, twins = matrices(), matrices()
    run(LARS(params, lr=0.02, weight_decay=0.1), params, 20)
    run(Layerwise(torch.optim.SGD(twins, lr=0.02, momentum=0.9, weight_decay=0.1)), twins, 20)
    assert largest_difference(twins, params) < 1e-11


def test_a_group_that_does_not_adapt_is_the_bases_bit_for_bit() -> None:
    params, twins = layers(), layers()
    optimizer = Layerwise(torch.optim.NAdam([{"params": params[:2]}, {"params": params[2:], "adapt": False}], lr=0.01))
    base = torch.optim.NAdam(twins, lr=0.01)
    run(optimizer, params, 5)
    run(base, twins, 5)
    assert all(torch.equal(x, y) for x, y in zip(params[2:], twins[2:], strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(params[:2], twins[:2], strict=True))
    assert [float(ratio) for ratio in list(optimizer.trust_ratios().values())[2:]] == [1.0] * (len(params) - 2)


def test_the_rate_comes_back_when_the_base_fails() -> None:
    x = torch.ones(3, requires_grad=True)
    optimizer = Layerwise(torch.optim.SGD([x], lr=0.125))
    x.grad = torch.ones(3)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = optimizer.base.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.125
    handle.remove()
    optimizer.step()
    assert not torch.equal(x, torch.ones(3))


def test_a_state_dict_of_the_base_alone_loads() -> None:
    params = matrices()
    base = torch.optim.NAdam(params, lr=0.01)
    run(base, params, 3)
    optimizer = Layerwise(torch.optim.NAdam(params, lr=0.5), phi=(0.1, 2.0), adapt=True)
    optimizer.load_state_dict(base.state_dict())
    (group,) = optimizer.param_groups
    assert (group["lr"], group["phi"], group["adapt"]) == (0.01, (0.1, 2.0), True)
    assert float(optimizer.state[params[0]]["step"]) == 3


def test_a_state_dict_of_the_base_alone_keeps_what_is_excluded() -> None:
    params = matrices()
    base = torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:]}], lr=0.01)
    run(base, params, 1)
    groups = [{"params": params[:1]}, {"params": params[1:], "adapt": False, "phi": (0.1, 2.0)}]
    optimizer = Layerwise(torch.optim.AdamW(groups, lr=0.5))
    optimizer.load_state_dict(base.state_dict())
    assert [(group["adapt"], group["phi"]) for group in optimizer.param_groups] == [(True, None), (False, (0.1, 2.0))]


def test_bfloat16_weights_move_however_short_the_bases_step() -> None:
    """Of 1 they would lose all that is below 2^-9; the ratio must be that of the whole step, to bfloat16's rounding."""
    gradient = torch.linspace(1e-5, 1e-4, 8)
    ratios = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(8, dtype=dtype, requires_grad=True)
        optimizer = Layerwise(torch.optim.SGD([x], lr=0.05))
        x.grad = gradient.to(dtype)
        optimizer.step()
        assert float((x.detach().float() - 1).norm()) == pytest.approx(0.05 * 8**0.5, rel=0.1)
        assert optimizer.param_groups[0]["lr"] == 0.05
        ratios[dtype] = float(optimizer.trust_ratios()[0])
    assert ratios[torch.bfloat16] == pytest.approx(8**0.5 / float(gradient.norm()), rel=0.01)
    assert ratios[torch.float32] == pytest.approx(ratios[torch.bfloat16], rel=0.01)


def test_float16_weights_are_refused_where_they_adapt() -> None:
    x = torch.ones(3, dtype=torch.float16, requires_grad=True)
    x.grad = torch.ones_like(x)
    wide = torch.ones(3, requires_grad=True)
    wide.grad = torch.ones_like(wide)
    optimizer = Layerwise(torch.optim.SGD([{"params": [wide]}, {"params": [x]}], lr=0.1))
    with pytest.raises(ValueError, match="expected float32 or bfloat16 weights where they adapt"):
        optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]
    Layerwise(torch.optim.SGD([x], lr=0.1), adapt=False).step()
    assert float(x.detach()[0]) == pytest.approx(0.9, rel=1e-3)


def test_settings_of_a_group_are_checked() -> None:
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"phi=\(3, 1\): expected"):
        Layerwise(torch.optim.SGD([{"params": [x], "phi": (3, 1)}], lr=0.1))
    optimizer = Layerwise(torch.optim.SGD([x], lr=0.1))
    with pytest.raises(ValueError, match=r"phi=\(3, 1\): expected"):
        optimizer.add_param_group({"params": [torch.ones(2, requires_grad=True)], "phi": (3, 1)})
    assert len(optimizer.param_groups) == 1


# ---- a small transformer ----


class Transformer(nn.Module):
    """One block over 16 symbols of 16 positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 32)
        self.position = nn.Embedding(16, 32)
        self.block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 16)

    def forward(self, symbols: Tensor) -> Tensor:
        h = self.embedding(symbols) + self.position(torch.arange(symbols.shape[1]))
        return self.head(self.block(h))


def trained(lr: float, steps: int = 60) -> list[float]:
    """Train Layerwise(Muon) on the matrices and LAMB on the rest: say in every position what stood at the start."""
    torch.manual_seed(0)
    model = Transformer()
    decaying, others = param_groups(model, weight_decay=0.01)
    matrices = [x for name, x in model.named_parameters() if x.dim() == 2 and name.startswith("block")]
    own = {id(x) for x in matrices}
    rest = [x for group in (decaying, others) for x in group["params"] if id(x) not in own]
    optimizers = [Layerwise(torch.optim.Muon(matrices, lr=lr, weight_decay=0.01)), LAMB(rest, lr=lr)]
    losses = []
    for step in range(steps):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / steps)
        symbols = torch.randint(16, (64, 16))
        targets = symbols[:, :1].expand(-1, 16)
        loss = cross_entropy(model(symbols).flatten(0, 1), targets.flatten())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_muon_trains_a_transformer() -> None:
    # Chance is log 16 = 2.77. The task needs attention: what to say stands in another position.
    losses = trained(lr=0.05)
    assert losses[0] == pytest.approx(2.77, abs=0.4)
    assert median(losses[-10:]) < 1.0
    still = trained(lr=0.0, steps=5)
    assert min(still) > 2.3


def test_a_step_that_fails_puts_the_weights_back() -> None:
    params = matrices()
    optimizer = Layerwise(torch.optim.SGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.1, foreach=False))
    before = [x.detach().clone() for x in params]
    give_gradients(params, 0)

    def stop(*_: Any) -> None:
        assert not torch.equal(params[0], before[0])  # at 2^40, far away
        raise KeyboardInterrupt

    optimizer.base.register_step_post_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]


@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e-12])
def test_a_small_gradient_keeps_its_direction_in_float32(scale: float) -> None:
    x = torch.nn.Parameter(torch.linspace(-1, 1, 64))
    x.grad = torch.randn(64, generator=torch.Generator().manual_seed(0)) * scale
    old, direction = x.detach().clone(), x.grad / x.grad.norm()
    Layerwise(torch.optim.SGD([x], lr=0.1)).step()
    moved = old - x.detach()
    # The weights of order 1 are rounded at 6e-8, and so are the moves of order 0.1.
    torch.testing.assert_close(moved / (0.1 * old.norm()), direction, rtol=1e-5, atol=1e-6)


def test_a_base_that_is_not_linear_is_found_within_a_wrapper() -> None:
    with pytest.raises(ValueError, match="base='Rprop': expected an optimizer linear in its learning rate"):
        Layerwise(CPUOffload(torch.optim.Rprop(matrices(), lr=0.1)))


def test_a_base_without_a_rate_is_refused() -> None:
    base = torch.optim.SGD(matrices(), lr=0.1)
    base.param_groups[0]["lr"] = None
    with pytest.raises(ValueError, match="base='SGD': expected an optimizer with a learning rate for each group"):
        Layerwise(base)


def test_the_last_of_two_around_one_base_has_its_way() -> None:
    base = torch.optim.SGD([{"params": matrices(), "adapt": False}, {"params": layers()[:1]}], lr=0.1)
    Layerwise(base, phi=(0.0, 1.0))
    optimizer = Layerwise(base, phi=(0.0, 2.0), adapt=True)
    assert [group["phi"] for group in optimizer.param_groups] == [(0.0, 2.0)] * 2
    assert [group["adapt"] for group in optimizer.param_groups] == [False, True]  # what the user said stays
    assert Layerwise(base, adapt=False).param_groups[1]["adapt"] is False
    optimizer = Layerwise(base, phi=(0.0, 3.0))
    assert set(optimizer.state_dict()["param_groups"][0]) == set(base.defaults) | {"params", "phi", "adapt"}
    optimizer.load_state_dict(optimizer.state_dict())
    for again in (base, copy.deepcopy(base)):
        assert Layerwise(again).param_groups[0]["phi"] is None


def test_a_rate_of_16_bits_has_room_for_the_long_step() -> None:
    x = torch.nn.Parameter(torch.ones(4))
    optimizer = Layerwise(torch.optim.SGD([x], lr=torch.tensor(0.5, dtype=torch.float16), foreach=False))
    x.grad = torch.ones(4)
    optimizer.step()
    assert torch.equal(x, torch.full((4,), 0.5))
    assert optimizer.param_groups[0]["lr"].dtype is torch.float16


def test_a_group_added_through_the_base_is_moved() -> None:
    params = layers()
    base = torch.optim.SGD(params[:1], lr=0.1)
    optimizer = Layerwise(base)
    base.add_param_group({"params": params[6:7]})
    give_gradients(params, 0)
    optimizer.step()
    assert sorted(optimizer.trust_ratios()) == [0, 1]
    assert optimizer.param_groups[1]["adapt"] is True
