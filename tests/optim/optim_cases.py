"""What the optimizer tests have in common: optimizers by name, layers of awkward shapes, repeatable gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from largebatch import LAMB, LARS, NLAMB, NNLAMB
from largebatch.optim import backends

Build = Callable[..., torch.optim.Optimizer]

BACKENDS = ("reference", "foreach")  # for every dtype
NATIVE = ("native",) if backends._native() else ()  # it is not there if there was no compiler
FLOAT32_BACKENDS = (*BACKENDS, *NATIVE)

# One entry for every rule and switch that changes the mathematics.
OPTIMIZERS: dict[str, tuple[type, dict[str, Any]]] = {
    "lamb": (LAMB, {"lr": 1e-2}),
    "lamb-uncorrected": (LAMB, {"lr": 1e-2, "bias_correction": False}),
    "lamb-folded": (LAMB, {"lr": 1e-2, "bias_correction": "folded"}),
    "lamb-no-decay": (LAMB, {"lr": 1e-2, "weight_decay": 0.0}),
    "lamb-decoupled": (LAMB, {"lr": 1e-2, "weight_decay": 0.3, "decoupled_weight_decay": True}),
    "lamb-clipped": (LAMB, {"lr": 1e-2, "phi": (0.5, 2.0)}),
    "lamb-callable": (LAMB, {"lr": 1e-2, "phi": torch.sqrt}),
    "lamb-bounded": (LAMB, {"lr": 1e-2, "ratio_bounds": (0.01, 0.3)}),
    "lamb-l1": (LAMB, {"lr": 1e-2, "norm": "l1"}),
    "lamb-linf": (LAMB, {"lr": 1e-2, "norm": "linf"}),
    "lamb-unadapted": (LAMB, {"lr": 1e-2, "adapt": False}),
    "lamb-maximize": (LAMB, {"lr": 1e-2, "maximize": True}),
    "lamb-capturable": (LAMB, {"lr": 1e-2, "capturable": True}),
    "lamb-tensor-lr": (LAMB, {"lr": torch.tensor(1e-2, dtype=torch.float64)}),
    "nlamb": (NLAMB, {"lr": 1e-2}),
    "nlamb-uncorrected": (NLAMB, {"lr": 1e-2, "bias_correction": False, "maximize": True}),
    "nnlamb": (NNLAMB, {"lr": 1e-2}),
    "nnlamb-capturable": (NNLAMB, {"lr": torch.tensor(1e-2, dtype=torch.float64), "capturable": True}),
    "nnlamb-uncorrected": (NNLAMB, {"lr": 1e-2, "bias_correction": False}),
    "lars": (LARS, {"lr": 1e-2}),
    "lars-nesterov": (LARS, {"lr": 1e-2, "nesterov": True, "maximize": True}),
    "lars-tuned": (LARS, {"lr": 1e-2, "trust_coefficient": 0.5, "eps": 0.1, "norm": "l1", "phi": (0.0, 2.0)}),
    "lars2017": (LARS, {"lr": 1e-2, "form": "2017"}),
    "lars2017-nesterov": (LARS, {"lr": 1e-2, "form": "2017", "nesterov": True, "trust_coefficient": 0.5}),
    "lars2017-maximize": (LARS, {"lr": 1e-2, "form": "2017", "maximize": True, "momentum": 0.0}),
    "lars2017-tensor-lr": (LARS, {"lr": torch.tensor(1e-2, dtype=torch.float64), "form": "2017"}),
}


def build(name: str, params: Any, **settings: Any) -> torch.optim.Optimizer:
    """Make the optimizer of this name in the table."""
    made, defaults = OPTIMIZERS[name]
    return made(params, **{**defaults, **settings})


def layers(dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """Make parameters of every shape and memory layout, of very different norms; the largest fills several tiles."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    made = [
        draw(31, 71, scale=0.02),  # with the buckets of conftest.py: nine tiles, the last one partly filled
        draw(7, scale=100.0),
        draw(),
        draw(0, 3),
        torch.zeros(5, 2, dtype=dtype),  # takes a plain step
        draw(4, 5, 6, 7).to(memory_format=torch.channels_last),
        draw(9, 6).t(),  # dense, but not in order
        draw(8, 10)[:, ::2],  # with holes
        draw(1, 3, 1),
    ]
    return [x.detach().requires_grad_() for x in made]


def give_gradients(params: list[Tensor], step: int) -> None:
    """Give each parameter the gradient of this step: a function of nothing but the step and the shapes."""
    generator = torch.Generator().manual_seed(1000 + step)
    for i, x in enumerate(params):
        g = 10.0 ** (i % 5 - 2) * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        x.grad = torch.empty_like(x).copy_(g)


def run(optimizer: torch.optim.Optimizer, params: list[Tensor], steps: int, first: int = 0) -> None:
    """Take steps ``first`` to ``first + steps - 1``."""
    for step in range(first, first + steps):
        give_gradients(params, step)
        optimizer.step()


def largest_difference(a: list[Tensor], b: list[Tensor]) -> float:
    """Return the largest difference of two lists of layers, each relative to the layer's largest element."""
    return max(
        float((x.detach().double() - y.detach().double()).abs().max() / (y.detach().double().abs().max() + 1e-30))
        for x, y in zip(a, b, strict=True)
        if x.numel()
    )
