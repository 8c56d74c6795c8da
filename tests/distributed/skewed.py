"""Layers whose shards are very unlike each other, and optimizers: what sharded and single-process runs both work on."""

from typing import Any

import torch
from torch import Tensor, nn

from largebatch import LAMB, LARS, NLAMB, NNLAMB, Layerwise

STEPS = 20

# dim 0 of 1 and 3 leave ranks without a row, 18 rows and 5 divide by no number of ranks
SHAPES = {"embedding": (18, 6), "one_row": (1, 5), "three_rows": (3, 4), "five_rows": (5, 2, 3), "bias": (7,)}

OPTIMIZERS: dict[str, tuple[type, dict[str, Any]]] = {
    "lamb": (LAMB, {"lr": 1e-2}),
    "lamb-reference": (LAMB, {"lr": 1e-2, "backend": "reference"}),
    "lamb-l1": (LAMB, {"lr": 1e-2, "norm": "l1"}),
    "lamb-linf": (LAMB, {"lr": 1e-2, "norm": "linf"}),
    "lamb-phi": (LAMB, {"lr": 1e-2, "phi": (0.5, 2.0)}),
    "lamb-bf16-state": (LAMB, {"lr": 1e-2, "state_dtype": torch.bfloat16}),
    "nlamb": (NLAMB, {"lr": 1e-2}),
    "nnlamb": (NNLAMB, {"lr": 1e-2}),
    "lars": (LARS, {"lr": 1e-2}),
    "lars2017": (LARS, {"lr": 1e-2, "form": "2017", "trust_coefficient": 0.1}),
    "layerwise": (Layerwise, {"lr": 1e-2}),
}
EACH_KIND = ("lamb", "nlamb", "nnlamb", "lars", "layerwise")


class Layers(nn.Module):
    """Parameters of the shapes above, the same on every rank."""

    def __init__(self, repeat: int = 1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for number in range(repeat):
            suffix = f"_{number}" if number else ""
            for name, shape in SHAPES.items():
                value = torch.randn(shape, generator=generator)
                self.register_parameter(name + suffix, nn.Parameter(skew(value)))


def skew(value: Tensor) -> Tensor:
    """Make the weights of the first half of the rows 20 times larger than the rest."""
    scale = torch.ones(value.shape[0], *[1] * (value.dim() - 1))
    scale[: (len(value) + 1) // 2] = 20
    return value * scale


def gradient(name: str, shape: torch.Size, step: int) -> Tensor:
    """Return the whole gradient of one step: in the first half of the rows its sign alternates from step to step.

    An average over such gradients is some 20 times smaller there than in the other half, where they agree.
    """
    generator = torch.Generator().manual_seed(1000 * step + list(SHAPES).index(name.rstrip("_0123456789")))
    value = 1 + 0.1 * torch.randn(shape, generator=generator)
    value[: (len(value) + 1) // 2] *= (-1) ** step
    return 0.1 * value


def break_gradient(name: str, value: Tensor, step: int) -> Tensor:
    """Put an inf and a NaN into single elements at two of the steps."""
    if name == "embedding" and step in (3, 7):
        value.view(-1)[step] = float("inf") if step == 3 else float("nan")
    return value


def build(name: str, params: Any) -> torch.optim.Optimizer:
    """Make the optimizer of this name."""
    made, settings = OPTIMIZERS[name]
    if made is Layerwise:
        return Layerwise(torch.optim.AdamW(params, **settings))
    return made(params, **settings)
