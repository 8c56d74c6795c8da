"""LARS: momentum SGD, taken at a length that each layer's own weights set."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .base import LayerwiseOptimizer, check, check_common
from .norms import Phi, clip


class Hyper(NamedTuple):
    """The numbers of one step of LARS."""

    lr: float | Tensor
    momentum: float
    weight_decay: float
    nesterov: bool
    maximize: bool


class LARS(LayerwiseOptimizer):
    """Layerwise adaptive rate scaling (Algorithm 1 of the paper, or the form of 2017)."""

    state_keys = ("momentum_buffer",)
    counts_steps = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        momentum: float = 0.9,
        weight_decay: float = 0.01,
        *,
        form: str = "paper",
        trust_coefficient: float = 1.0,
        eps: float = 0.0,
        nesterov: bool = False,
        phi: Phi = None,
        norm: str = "l2",
        adapt: bool = True,
        backend: str = "auto",
        maximize: bool = False,
    ) -> None:
        check("form", form, form in ("paper", "2017"), "'paper' or '2017'")
        self.form = form
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "nesterov": nesterov,
            "phi": phi,
            "adapt": adapt,
            "maximize": maximize,
            "capturable": False,
        }
        super().__init__(params, defaults, norm=norm, backend=backend)

    @property
    def rule(self) -> str:  # type: ignore[override]
        return "lars" if self.form == "paper" else "lars2017"

    def _check_group(self, group: dict[str, Any]) -> None:
        check_common(group)
        check("momentum", group["momentum"], 0 <= group["momentum"] < 1, "a number in [0, 1)")
        check("trust_coefficient", group["trust_coefficient"], group["trust_coefficient"] > 0, "a number > 0")

    def _hyper(self, group: dict[str, Any], t: Any) -> Hyper:
        return Hyper(group["lr"], group["momentum"], group["weight_decay"], group["nesterov"], group["maximize"])

    def _trust_ratio(self, x_norm: Tensor, u_norm: Tensor, group: dict[str, Any]) -> Tensor:
        divisor = u_norm + group["eps"]
        if self.form == "2017":
            divisor = divisor + group["weight_decay"] * x_norm  # u_norm is ‖g‖ here
        ratio = group["trust_coefficient"] * clip(group["phi"], x_norm) / divisor
        return torch.where((x_norm == 0) | (u_norm == 0), 1.0, ratio)
