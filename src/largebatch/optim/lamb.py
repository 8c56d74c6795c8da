"""LAMB: Adam's direction, taken at a length that each layer's own weights set."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .base import LayerwiseOptimizer, check, check_common
from .norms import Phi


class Hyper(NamedTuple):
    """The numbers of one step of the LAMB family; t is the layer's step count.

    m̂ = m_scale·m + g_scale·g and v̂ = v_scale·v + g_sq_scale·g² say which member of the family it is.
    """

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool
    m_scale: Any
    g_scale: Any
    v_scale: Any
    g_sq_scale: Any


class LAMB(LayerwiseOptimizer):
    """Layerwise adaptive moments (Algorithm 2 of the paper)."""

    rule = "lamb"
    state_keys = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        bias_correction: bool = True,
        phi: Phi = None,
        norm: str = "l2",
        adapt: bool = True,
        backend: str = "auto",
        state_dtype: torch.dtype | None = None,
        capturable: bool = False,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "phi": phi,
            "adapt": adapt,
            "capturable": capturable,
            "maximize": maximize,
        }
        check(
            "state_dtype", state_dtype, state_dtype is None, "None: states are float32, or the parameter's wider dtype"
        )
        super().__init__(params, defaults, norm=norm, backend=backend)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_common(group)
        betas = group["betas"]
        check("betas", betas, len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)")

    def _hyper(self, group: dict[str, Any], t: Any) -> Hyper:
        beta1, beta2 = group["betas"]
        corrects = group["bias_correction"]
        return Hyper(
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            m_scale=1 / (1 - beta1**t) if corrects else 1.0,
            g_scale=0.0,
            v_scale=1 / (1 - beta2**t) if corrects else 1.0,
            g_sq_scale=0.0,
        )
