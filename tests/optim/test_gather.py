"""Guards what a step keeps from the one before: the layers that it gathered, while they are the same, and no longer."""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_cases import FLOAT32_BACKENDS
from torch.nn import Parameter

from largebatch import LAMB


class Watched(LAMB):
    """LAMB, counting how often it goes through its groups."""

    times_gathered = 0

    def _init_group(self, group: dict[str, Any]) -> None:
        self.times_gathered += group is self.param_groups[0]
        super()._init_group(group)


def new_parameter(seed: int) -> Parameter:
    torch.manual_seed(seed)
    x = Parameter(torch.randn(4, 3))
    x.grad = torch.randn(4, 3)
    return x


def started() -> Watched:
    """Two steps of three layers in two groups."""
    a, b, c = (new_parameter(seed) for seed in range(3))
    optimizer = Watched([{"params": [a, b]}, {"params": [c], "weight_decay": 0.1}], lr=0.1)
    optimizer.step()
    a.grad = torch.randn(4, 3)
    optimizer.step()
    assert optimizer.times_gathered == 1
    return optimizer


def parameters(optimizer: Watched) -> list[Parameter]:
    return [x for group in optimizer.param_groups for x in group["params"]]


def first(optimizer: Watched) -> Parameter:
    return parameters(optimizer)[0]


def replace_state(optimizer: Watched) -> None:
    state = optimizer.state[first(optimizer)]
    state["exp_avg"] = state["exp_avg"] * 2


def move_to_the_second_group(optimizer: Watched) -> None:
    first, second = (group["params"] for group in optimizer.param_groups)
    second.insert(0, first.pop())  # all parameters are in the same order as before


UNSEEN: dict[str, Callable[[Watched], object]] = {
    "another gradient": lambda optimizer: setattr(first(optimizer), "grad", torch.ones(4, 3)),
    "another rate": lambda optimizer: optimizer.param_groups[1].update(lr=0.3),
    "no adaptation": lambda optimizer: optimizer.param_groups[0].update(adapt=False),
    "weights in place": lambda optimizer: first(optimizer).data.mul_(3),
}
SEEN: dict[str, Callable[[Watched], object]] = {
    "a gradient gone": lambda optimizer: setattr(first(optimizer), "grad", None),
    "another parameter": lambda optimizer: optimizer.param_groups[0]["params"].__setitem__(1, new_parameter(7)),
    "parameters in another order": lambda optimizer: optimizer.param_groups[0]["params"].reverse(),
    "a parameter in another group": move_to_the_second_group,
    "another group": lambda optimizer: optimizer.add_param_group({"params": [new_parameter(8)]}),
    "a copy of a group": lambda optimizer: optimizer.param_groups.__setitem__(1, dict(optimizer.param_groups[1])),
    "another state": replace_state,
    "a state gone": lambda optimizer: optimizer.state.pop(first(optimizer)),
    "a loaded state dict": lambda optimizer: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
}


@pytest.mark.parametrize(
    ("change", "again"),
    [pytest.param(change, 0, id=name) for name, change in UNSEEN.items()]
    + [pytest.param(change, 1, id=name) for name, change in SEEN.items()],
)
def test_layers_are_gathered_anew_when_they_are_others(change: Callable[[Watched], object], again: int) -> None:
    optimizer = started()
    change(optimizer)
    fresh = copy.deepcopy(optimizer)  # which keeps no layers, and no gradients
    pairs = list(zip(parameters(optimizer), parameters(fresh), strict=True))
    for x, y in pairs:
        y.grad = x.grad
    for _ in range(2):
        optimizer.step()
        fresh.step()
    assert optimizer.times_gathered == 1 + again
    for x, y in pairs:
        assert torch.equal(x, y)
        assert all(torch.equal(value, fresh.state[y][key]) for key, value in optimizer.state[x].items())
    assert optimizer.trust_ratios().keys() == fresh.trust_ratios().keys()


def test_a_gradient_that_comes_later_is_seen() -> None:
    optimizer = started()
    x, g = first(optimizer), first(optimizer).grad
    x.grad = None
    optimizer.step()
    before = x.detach().clone()
    optimizer.step()
    assert torch.equal(x, before)
    x.grad = g
    optimizer.step()
    assert not torch.equal(x, before)
    assert optimizer.times_gathered == 3


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
def test_gradients_are_let_go_of(backend: str) -> None:
    x = new_parameter(0)
    optimizer = LAMB([x], backend=backend)
    for _ in range(2):
        x.grad = torch.ones(4, 3)
        optimizer.step()
        held = weakref.ref(x.grad)
        x.grad = None
        assert held() is None


def test_what_torch_allows_in_the_state_is_let_be_and_what_is_no_count_refused() -> None:
    x = torch.nn.Parameter(torch.ones(3))
    x.grad = torch.ones(3)
    optimizer = LAMB([x])
    optimizer.state["note"] = 3
    optimizer.step()
    optimizer.step()
    assert optimizer.state["note"] == 3
    optimizer.state[x]["step"] = 5
    with pytest.raises(ValueError, match="step=5: expected a float32 tensor on cpu"):
        optimizer.step()
