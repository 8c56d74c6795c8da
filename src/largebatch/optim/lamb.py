"""LAMB, and its Nesterov variants N-LAMB and NN-LAMB."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .base import LayerwiseOptimizer, rate_of
from .checks import check, is_interval
from .dialects import dialect
from .norms import Phi, Ratio

Correction = bool | Literal["folded"]

TINY = torch.finfo(torch.float32).tiny  # so that without ε, 0/0 is 0; √v is above 1e-23 or 0, and does not see it


class Hyper(NamedTuple):
    """The numbers of a layer's t-th step. What tells the family apart is how m̂ and v̂ come from m, v and g.

    m̂ = m_scale·m + g_scale·g and v̂ = v_scale·v + g_sq_scale·g². Under capture, and in a compiled step, those that
    depend on t are 0-D tensors.
    """

    t: float | Tensor
    rate: float | Tensor  # the learning rate η, times the bias correction where that is folded into it
    keep: float | Tensor  # what a decoupled weight decay leaves of x
    beta1: float
    beta2: float
    eps: float
    weight_decay: float  # λ, where it is part of u
    maximize: bool
    m_scale: float | Tensor
    g_scale: float | Tensor
    v_scale: float | Tensor
    g_sq_scale: float | Tensor


class LAMB(LayerwiseOptimizer):
    r"""Layerwise adaptive moments: Adam's direction, at a length set by each layer's own weights.

    For every layer x with gradient g, at step t:

    1. m ← β₁ m + (1 − β₁) g
    2. v ← β₂ v + (1 − β₂) g²
    3. m̂ = m / (1 − β₁ᵗ),  v̂ = v / (1 − β₂ᵗ)  (or m and v, without ``bias_correction``)
    4. u = m̂ / (√v̂ + ε) + λ x
    5. x ← x − η · φ(‖x‖)/‖u‖ · u  (the factor is 1 if ‖x‖ or ‖u‖ is zero, or where the layer does not adapt)

    Use it to train with batches of thousands, where the rate follows the batch by a rule instead of a search (see
    `largebatch.plan`); give it ``param_groups(model)``, so that biases and norm layers neither decay nor adapt. Do not
    use it for small batches that AdamW is tuned for, nor for layers of one element, which under a pure trust ratio
    move by η·|x| whatever their gradient.

    Args:
        params: what `torch.optim` takes: tensors, named tensors, or groups. The keys ``lr, betas, eps, weight_decay,
            bias_correction, phi, adapt, maximize, capturable`` and those of the dialects may differ by group.
        lr: the learning rate η, a number or a 0-D tensor: the share of its own norm by which a layer moves in one
            step, so that 1e-3 to 1e-2 is usual, ten times AdamW's.
        betas: the decay rates β₁ of the gradient's average and β₂ of its square's.
        eps: ε, added outside the square root, after the bias correction. With 0, an element that never had a gradient
            stays: 0/0 is 0.
        weight_decay: λ. It is part of u, so the trust ratio sees it; 0 turns decay off and nothing else.
        bias_correction: False leaves line 3 out (the paper's finding: a warm-up does the same). "folded" multiplies
            the rate by √(1 − β₂ᵗ)/(1 − β₁ᵗ) instead, as DeepSpeed does: under a trust ratio that corrects nothing, and
            is a hidden warm-up, x0.32 at step 1.
        phi: φ. None is the identity; a pair (low, high) clips ‖x‖; a callable gets the vector of a group's ‖x‖.
        norm: "l2", "l1" or "linf", for both ‖x‖ and ‖u‖.
        adapt: False turns the trust ratio off, and nothing else.
        backend: "auto", "reference", "foreach", "native" or "triton"; `LAMB.backend` says which it is.
        state_dtype: of m and v: None for float32 (float64 for float64 parameters), or torch.bfloat16, half the memory,
            stochastically rounded.
        capturable: keep step counts on the parameters' device, so that a CUDA graph can hold the step, and
            `torch.amp.GradScaler` need not wait for the device (Triton backend).
        maximize: ascend.
        decoupled_weight_decay: x ← (1 − ηλ) x before line 4, which then has no λ (Keras; timm's ``decoupled_decay``).
        always_adapt: False leaves groups with ``weight_decay=0`` unadapted (Apex, timm).
        ratio_bounds: a pair that clips the trust ratio itself (DeepSpeed: (0.01, 10)).
        master_weights: keep a float32 copy of bfloat16 and float16 parameters, and move that. Load weights into the
            model before its first step, or into the state dict: the copy is made once.

    Raises:
        ValueError: a setting out of range, complex parameters, sparse gradients, or a backend that cannot serve.

    Example:
        >>> from largebatch import LAMB, param_groups
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = LAMB(param_groups(model, weight_decay=0.01), lr=2e-3)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.trust_ratios())
        ['bias', 'weight']

    Source: the paper's Algorithm 2 (arXiv 1904.00962, v1, v4 and v5; v3 has no bias correction).
    """

    rule = "lamb"
    state_keys = ("exp_avg", "exp_avg_sq")
    counts_steps = True

    dialect = staticmethod(dialect)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        bias_correction: Correction = True,
        phi: Phi = None,
        norm: str = "l2",
        adapt: bool = True,
        backend: str = "auto",
        state_dtype: torch.dtype | None = None,
        capturable: bool = False,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        always_adapt: bool = True,
        ratio_bounds: tuple[float, float] | None = None,
        master_weights: bool = False,
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
            "decoupled_weight_decay": decoupled_weight_decay,
            "always_adapt": always_adapt,
            "ratio_bounds": ratio_bounds,
        }
        super().__init__(
            params, defaults, norm=norm, backend=backend, state_dtype=state_dtype, master_weights=master_weights
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        betas, bounds, correction = group["betas"], group["ratio_bounds"], group["bias_correction"]
        check("betas", betas, len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)")
        check("ratio_bounds", bounds, bounds is None or is_interval(bounds), "None or a pair (low, high)")
        check("bias_correction", correction, correction in (True, False, "folded"), "True, False or 'folded'")

    def _hyper(self, group: dict[str, Any], t: Any) -> Hyper:
        (beta1, beta2), correction = group["betas"], group["bias_correction"]
        lr, weight_decay, decoupled = rate_of(group), group["weight_decay"], group["decoupled_weight_decay"]
        m_scale, g_scale, v_scale, g_sq_scale = self._scales(beta1, beta2, t, correction is True)
        return Hyper(
            t=t,
            rate=lr * (1 - beta2**t) ** 0.5 / (1 - beta1**t) if correction == "folded" else lr,
            keep=1 - lr * weight_decay if decoupled else 1.0,
            beta1=beta1,
            beta2=beta2,
            eps=max(group["eps"], TINY),
            weight_decay=0.0 if decoupled else weight_decay,
            maximize=group["maximize"],
            m_scale=m_scale,
            g_scale=g_scale,
            v_scale=v_scale,
            g_sq_scale=g_sq_scale,
        )

    @staticmethod
    def _scales(beta1: float, beta2: float, t: Any, corrects: bool) -> tuple[Any, Any, Any, Any]:
        """Return the factors of m and g in m̂, and of v and g² in v̂."""
        if not corrects:
            return 1.0, 0.0, 1.0, 0.0
        return 1 / (1 - beta1**t), 0.0, 1 / (1 - beta2**t), 0.0

    def _ratio(self, group: dict[str, Any]) -> Ratio | None:
        if not group["always_adapt"] and group["weight_decay"] == 0:
            return None
        # A decoupled decay comes first, and shortens x.
        shrink = abs(1 - rate_of(group) * group["weight_decay"]) if group["decoupled_weight_decay"] else 1.0
        return Ratio(self._phi(group), shrink=shrink, bounds=group["ratio_bounds"])


class NLAMB(LAMB):
    r"""LAMB with Nesterov momentum (N-LAMB): Nadam's look-ahead on the first moment.

    As `LAMB`, but line 3 is

    m̂ = β₁ m / (1 − β₁ᵗ⁺¹) + (1 − β₁) g / (1 − β₁ᵗ),  v̂ = β₂ v / (1 − β₂ᵗ)

    and without ``bias_correction`` the denominators are left out. docs/mathematics.md derives it. The paper reports an
    accuracy comparable to LAMB's on ImageNet at a batch of 32K; reach for it when you already tune momentum.

    Source: the paper's Algorithm 3, with a constant β₁; the defaults are Dozat's for Nadam, as in the paper.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.975, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        **settings: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, **settings)

    @staticmethod
    def _scales(beta1: float, beta2: float, t: Any, corrects: bool) -> tuple[Any, Any, Any, Any]:
        if not corrects:
            return beta1, 1 - beta1, beta2, 0.0
        return beta1 / (1 - beta1 ** (t + 1)), (1 - beta1) / (1 - beta1**t), beta2 / (1 - beta2**t), 0.0


class NNLAMB(NLAMB):
    r"""LAMB with Nesterov momentum on both moments (NN-LAMB).

    As `NLAMB`, but also

    v̂ = β₂ v / (1 − β₂ᵗ⁺¹) + (1 − β₂) g² / (1 − β₂ᵗ)

    Source: the paper's Algorithm 4, with constant β₁ and β₂.
    """

    @staticmethod
    def _scales(beta1: float, beta2: float, t: Any, corrects: bool) -> tuple[Any, Any, Any, Any]:
        m_scale, g_scale, v_scale, _ = NLAMB._scales(beta1, beta2, t, corrects)
        if not corrects:
            return m_scale, g_scale, v_scale, 1 - beta2
        return m_scale, g_scale, beta2 / (1 - beta2 ** (t + 1)), (1 - beta2) / (1 - beta2**t)
