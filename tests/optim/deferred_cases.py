"""A network with a tied weight, and steps of it: what the optimizer in the backward pass or on the CPU is run on."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from largebatch import LAMB, LARS, NNLAMB, Layerwise, param_groups

MAKES: dict[str, Callable[[nn.Module], Optimizer]] = {
    "lamb": lambda model: LAMB(param_groups(model)),
    "lamb, foreach": lambda model: LAMB(param_groups(model), backend="foreach"),
    "lamb, reference": lambda model: LAMB(param_groups(model), backend="reference"),
    "lamb, bfloat16 state": lambda model: LAMB(param_groups(model), state_dtype=torch.bfloat16),
    "lamb, masters": lambda model: LAMB(param_groups(model.bfloat16()), master_weights=True),
    "nnlamb": lambda model: NNLAMB(param_groups(model)),
    "lars": lambda model: LARS(param_groups(model), lr=1.0),
    "lars of 2017, no names": lambda model: LARS(model.parameters(), lr=1.0, form="2017"),
    "layerwise": lambda model: Layerwise(torch.optim.NAdam(param_groups(model))),
    "adamw": lambda model: torch.optim.AdamW(model.parameters()),
}


class Network(nn.Module):
    """The weight of `middle` is used twice, and `unused` never."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(12, 20)
        self.norm = nn.LayerNorm(20)
        self.middle = nn.Linear(20, 20)
        self.last = nn.Linear(20, 12)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.middle(torch.tanh(self.norm(self.first(x))))
        return self.last(torch.tanh(h) @ self.middle.weight)


def backward(model: nn.Module, step: int) -> None:
    """Compute gradients that differ from step to step."""
    dtype = next(model.parameters()).dtype
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step)).to(dtype)
    model(x).square().mean().backward()


def train(model: nn.Module, optimizer: Optimizer, steps: range = range(5)) -> None:
    """Take steps at a rate that changes from one to the next."""
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (step + 1)
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def plain(name: str, steps: int = 5) -> tuple[nn.Module, Optimizer]:
    """Train in the ordinary way."""
    model = Network()
    optimizer = MAKES[name](model)
    train(model, optimizer, range(steps))
    return model, optimizer


def with_a_group_added(wrap: Callable[[LAMB], Any]) -> tuple[nn.Module, Any]:
    """Train by what ``wrap`` makes of an optimizer whose state is cleared, and which gets a group, half way."""
    model = Network()
    optimizer = wrap(LAMB([x for name, x in model.named_parameters() if not name.startswith("last")]))
    train(model, optimizer, range(2))
    optimizer.state.clear()
    optimizer.add_param_group({"params": list(model.last.parameters()), "weight_decay": 0.1})
    train(model, optimizer, range(2, 4))
    return model, optimizer


def assert_same(model: nn.Module, optimizer: Any, expected_model: nn.Module, expected: Any) -> None:
    """To the bit: weights, state and trust ratios, and these in the same order."""
    for (name, x), y in zip(model.named_parameters(), expected_model.parameters(), strict=True):
        assert torch.equal(x, y), name
        assert optimizer.state.get(x, {}).keys() == expected.state.get(y, {}).keys()
        for key, value in optimizer.state.get(x, {}).items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(expected.state[y][key])), f"{name}.{key}"
    if hasattr(expected, "trust_ratios"):
        ratios, wanted = optimizer.trust_ratios(), expected.trust_ratios()
        assert list(ratios) == list(wanted)
        assert all(torch.equal(ratios[name], wanted[name]) for name in wanted)
