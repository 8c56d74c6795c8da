"""The paper's general strategy: any base optimizer, with its step rescaled layer by layer."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import LBFGS, Adafactor, Optimizer
from torch.optim.asgd import ASGD
from torch.optim.rprop import Rprop

from . import norms
from .base import rate_of, without_functions
from .checks import check, check_phi
from .precision import compute_dtype, store_weights
from .wrapper import Wrapper

# Their state depends on the learning rate, or they step more than once, or bound the rate by one of their own.
NOT_LINEAR = (LBFGS, ASGD, Rprop, Adafactor)


# The rate at which the base optimizer moves bfloat16 weights. At 1 a weight that moves by less than 2^-9 of itself
# stays where it is; at this one by less than 2^-33.
LONG_STEP = 2.0**24


class Moved(NamedTuple):
    """A layer that the base optimizer has moved."""

    name: str | int
    x: Tensor  # what this process holds of it
    old: Tensor  # what x was, if its group adapts
    group: dict[str, Any]
    cut: norms.Cut
    rate: float  # at which it was moved, if its group adapts


class Layerwise(Wrapper):
    r"""Any optimizer made layerwise: x ← x − η · φ(‖x‖)/‖u‖ · u, where u is the base optimizer's step at rate 1.

    1. The base optimizer takes its step with the learning rate 1, which moves x by −u, weight decay included.
       (bfloat16 weights move at 2²⁴, and u is that difference over 2²⁴: to them x − u would often be x.)
    2. The factor φ(‖x‖)/‖u‖ is reckoned, 1 if ‖x‖ or ‖u‖ is zero.
    3. x is set to what it was, minus η times the factor times u.

    Groups with ``adapt=False`` take the base optimizer's own step at its own rate. `Layerwise(torch.optim.AdamW(...))`
    is LAMB, and `Layerwise(torch.optim.SGD(...))` is LARS with the momentum normalised. For those two, `LAMB` and
    `LARS` are faster and more exact: here a float32 u is the difference of two weights, which rounds it at 6e-8 of the
    larger of |x| and |u|, and a copy of the adapted weights is held during the step.

    A layer that adapts and whose step is not finite stays where it was, and `trust_ratios()` says NaN for it; but what
    a gradient of inf or NaN did to the state is up to the base optimizer, and most of torch's keep it for ever.

    The base optimizer must be linear in its learning rate: its state may not depend on it, nor its update other than
    by a factor. Of torch's own, LBFGS, ASGD, Rprop and Adafactor are not.

    Args:
        base: the optimizer to wrap. Its groups, state, hooks and state dict are this optimizer's; give it
            ``param_groups(model)`` to exclude biases and norm layers. Group keys ``phi`` and ``adapt`` override.
        phi: φ. None is the identity; a pair (low, high) clips ‖x‖; a callable gets the vector of ‖x‖.
        norm: "l2", "l1" or "linf".
        adapt: False turns the trust ratio off, and leaves the base optimizer as it is.

    Raises:
        ValueError: a setting out of range, or a base optimizer that is not linear in its learning rate; in a step,
            float16 weights that are to adapt, whose range has no room for the difference.

    Example:
        >>> from largebatch import Layerwise
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = Layerwise(torch.optim.NAdam(model.parameters(), lr=1e-3))
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> len(optimizer.trust_ratios())
        2

    Source: section 3 of the paper, "general strategy".
    """

    first_layer = 0  # as in `LayerwiseOptimizer`

    def __init__(self, base: Optimizer, *, phi: norms.Phi = None, norm: str = "l2", adapt: bool = True) -> None:
        check("base", type(base).__name__, isinstance(base, Optimizer), "a torch.optim.Optimizer")
        check("base", type(base).__name__, not isinstance(base, NOT_LINEAR), "an optimizer linear in its learning rate")
        check("norm", norm, norm in norms.ORDERS, f"one of {', '.join(map(repr, norms.ORDERS))}")
        check_phi(phi)
        self.base = base
        self.norm = norm
        self._ratios: list[list[tuple[list[str | int], Tensor]]] = [[]]
        # In place of Optimizer.__init__, which would make groups and state of its own.
        self.__setstate__({"defaults": {**base.defaults, "phi": phi, "adapt": adapt}})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient; return what ``closure``, if one is given to compute them, does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        reported: list[tuple[list[str | int], Tensor]] = []
        for moved in self._step_at_unit_rate():
            measured = [norms.measure([layer.old], self.norm)[0] for layer in moved]
            measured_u = [norms.measure([update(layer)], self.norm)[0] for layer in moved]
            owners = range(len(moved))
            local = torch.stack([norms.join(pieces, owners, self.norm) for pieces in (measured, measured_u)])
            x_norms, u_norms = norms.combine(local, [layer.cut for layer in moved], self.norm).unbind()
            by_group = {id(group): norms.Ratio(group["phi"]) if group["adapt"] else None for group in self.param_groups}
            ratios = norms.trust_ratios(x_norms, u_norms, [by_group[id(layer.group)] for layer in moved])
            reported.append(([layer.name for layer in moved], ratios))
            for layer, ratio in zip(moved, ratios.unbind(), strict=True):
                if layer.group["adapt"]:
                    new = layer.old.to(compute_dtype(layer.x)) - rate_of(layer.group) * ratio * update(layer)
                    store_weights([layer.x], [torch.where(ratio.isfinite(), new, layer.old)])
        self._ratios[0] = reported
        return loss

    def _step_at_unit_rate(self) -> Iterable[list[Moved]]:
        """Let the base optimizer step, adapted groups at one rate, and return what it moved, device by device."""
        by_device: dict[torch.device, list[Moved]] = {}
        position, rates = self.first_layer, [group["lr"] for group in self.param_groups]
        for group, rate in zip(self.param_groups, [unit_rate(group) for group in self.param_groups], strict=True):
            names = group.get("param_names", [None] * len(group["params"]))
            for x, name in zip(group["params"], names, strict=True):
                parts = norms.parts(x, name, position)
                position += len(parts)
                if x.grad is not None:
                    old = x.detach().clone() if group["adapt"] else x
                    layers = [Moved(part.name, part.of(x), part.of(old), group, part.cut, rate) for part in parts]
                    by_device.setdefault(x.device, []).extend(layers)
            if group["adapt"]:
                group["lr"] = torch.full_like(group["lr"], rate) if isinstance(group["lr"], Tensor) else rate
        try:
            self.base.step()
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate
        return by_device.values()

    def trust_ratios(self) -> dict[str | int, Tensor]:
        """Return the trust ratio of every layer that the last step moved; see `LAMB.trust_ratios`."""
        return norms.by_name(
            (name, ratio)
            for names, ratios in self._ratios[0]
            for name, ratio in zip(names, ratios.unbind(), strict=True)
        )

    # ---- what is the base optimizer's ----

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters to the base optimizer."""
        if isinstance(param_group, dict):
            check_phi(param_group.get("phi"))
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state dict, but for a φ that is a function: loading leaves a group its own."""
        return without_functions(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this optimizer, or of the base optimizer alone."""
        own = [{key: group[key] for key in ("phi", "adapt")} for group in self.param_groups]
        self.base.load_state_dict(state_dict)
        for group, settings in zip(self.param_groups, own, strict=True):
            group.update(settings | group)  # where the loaded group lacks one, it stays as it was
        self._follow_base()

    def _follow_base(self) -> None:
        for group in self.param_groups:
            for key in ("phi", "adapt"):
                group.setdefault(key, self.defaults[key])
            check_phi(group["phi"])

    def __getstate__(self) -> dict[str, Any]:
        return {"base": self.base, "norm": self.norm, "defaults": self.defaults, "_ratios": [[]]}


def unit_rate(group: dict[str, Any]) -> float:
    """Return the rate at which the base optimizer is to move a group that adapts."""
    dtypes = {x.dtype for x in group["params"] if x.grad is not None and group["adapt"]}
    check("params", torch.float16, torch.float16 not in dtypes, "float32 or bfloat16 weights where they adapt")
    return LONG_STEP if torch.bfloat16 in dtypes else 1.0


def update(layer: Moved) -> Tensor:
    """Return u, by which a step at rate 1 moves the layer."""
    dtype = compute_dtype(layer.x)
    return (layer.old.to(dtype) - layer.x.to(dtype)) / layer.rate
