"""LARS: the paper's Algorithm 1, and the form of 2017 that most packages mean by the name."""

from typing import Any, Literal, NamedTuple

from torch import Tensor

from .base import LayerwiseOptimizer, rate_of
from .checks import check
from .norms import Phi, Ratio

Form = Literal["paper", "2017"]


class Hyper(NamedTuple):
    """The numbers of a layer's step."""

    rate: float | Tensor
    momentum: float
    weight_decay: float
    nesterov: bool
    maximize: bool


class LARS(LayerwiseOptimizer):
    r"""Layerwise adaptive rate scaling: momentum SGD, at a length set by each layer's own weights.

    For every layer x with gradient g. ``form="paper"``, where the momentum is what is normalised:

    1. m ← β m + (1 − β)(g + λ x)
    2. x ← x − η · τ φ(‖x‖)/(‖m‖ + ε) · m

    ``form="2017"``, where the ratio comes before the momentum:

    1. r = τ φ(‖x‖)/(‖g‖ + λ‖x‖ + ε)
    2. b ← β b + r (g + λ x)
    3. x ← x − η b

    The factor is 1 if ‖x‖ or the norm that divides it is zero, or where the layer does not adapt.

    Use it for convolutional networks at batches of thousands. On BERT it falls behind LAMB from a batch of 16K and
    diverges at 32K (the paper's Table 2). Give it ``param_groups(model)``, as for `LAMB`. The two forms want very
    different rates: the paper's moves a layer by the share η of its norm, that of 2017 by some τη/(1 − β), with
    τ = 0.001 in most packages and rates of 1 to 30.

    Args:
        params: what `torch.optim` takes. The keys ``lr, momentum, weight_decay, trust_coefficient, eps, nesterov, phi,
            adapt, maximize`` may differ by group.
        lr: the learning rate η, a number or a 0-D tensor.
        momentum: β.
        weight_decay: λ, part of the gradient in both forms; 0 turns decay off and nothing else.
        form: "paper" or "2017". In the latter the rate stands outside of the momentum, as in `torch.optim.SGD`; You et
            al. (2017) write it inside, which is the same as long as the rate is constant.
        trust_coefficient: τ.
        eps: ε.
        nesterov: look ahead: β m + (1 − β)(g + λ x) takes the place of m, and r (g + λ x) + β b that of b in line 3.
        phi: φ. None is the identity; a pair (low, high) clips ‖x‖; a callable gets the vector of a group's ‖x‖.
        norm: "l2", "l1" or "linf".
        adapt: False turns the trust ratio off, and nothing else: form "2017" is then `torch.optim.SGD`.
        backend: "auto", "reference", "foreach", "native" or "triton"; `LARS.backend` says which it is.
        maximize: ascend.

    Raises:
        ValueError: a setting out of range, complex parameters, sparse gradients, or a backend that cannot serve.

    Example:
        >>> import torch
        >>> from largebatch import LARS, param_groups
        >>> model = torch.nn.Conv2d(3, 8, 3)
        >>> optimizer = LARS(param_groups(model, weight_decay=1e-4), lr=4.0, form="2017", trust_coefficient=0.001)
        >>> optimizer.param_groups[1]["adapt"]
        False

    Source: Algorithm 1 of the LAMB paper (arXiv 1904.00962); You, Gitman and Ginsburg 2017 (arXiv 1708.03888).
    """

    state_keys = ("momentum_buffer",)
    counts_steps = False
    settings = (*LayerwiseOptimizer.settings, "form")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        momentum: float = 0.9,
        weight_decay: float = 0.01,
        *,
        form: Form = "paper",
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
            "form": form,  # beside `self.form`, so that a state dict says whose momentum it holds
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "nesterov": nesterov,
            "phi": phi,
            "adapt": adapt,
            "maximize": maximize,
        }
        super().__init__(params, defaults, norm=norm, backend=backend)

    @property
    def rule(self) -> str:  # type: ignore[override]
        return "lars" if self.form == "paper" else "lars2017"

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check("form", group["form"], group["form"] == self.form, f"{self.form!r} in all groups")
        check("momentum", group["momentum"], 0 <= group["momentum"] < 1, "a number in [0, 1)")
        check("trust_coefficient", group["trust_coefficient"], group["trust_coefficient"] > 0, "a number > 0")

    def _completed(self, group: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        is_sgds = "dampening" in group and group["momentum"] != 0
        form = group.get("form", "SGD's momentum" if is_sgds else self.form)
        check("state_dict", form, form == self.form, f"momentum of the form {self.form!r}, another quantity")
        return super()._completed(group, own)

    def _hyper(self, group: dict[str, Any], t: None) -> Hyper:
        return Hyper(rate_of(group), group["momentum"], group["weight_decay"], group["nesterov"], group["maximize"])

    def _ratio(self, group: dict[str, Any]) -> Ratio:
        decay = group["weight_decay"] if self.form == "2017" else 0.0  # ‖u‖ is ‖g‖ there
        return Ratio(self._phi(group), eps=group["eps"], decay=decay, coefficient=group["trust_coefficient"])
