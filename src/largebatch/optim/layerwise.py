"""The paper's general strategy: any base optimizer, with its step rescaled layer by layer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import LBFGS, Adafactor, Optimizer
from torch.optim.asgd import ASGD
from torch.optim.rprop import Rprop

from . import norms
from .base import FUNCTION, rate_of, with_own_functions, without_functions
from .checks import check, check_phi
from .gather import names_of
from .precision import compute_dtype, store_weights
from .wrapper import Wrapper

# Their state depends on the learning rate, or they step more than once, or bound the rate by one of their own.
NOT_LINEAR = (LBFGS, ASGD, Rprop, Adafactor)

# The rate at which the base optimizer moves the layers that adapt. At 1 a weight that moves by less than 2^-25 of
# itself, in bfloat16 by less than 2^-9, would stay where it is; at this one by less than 2^-65 and 2^-49.
LONG_STEP = 2.0**40

# The key of a group under which it lists what it has from the Layerwise around its optimizer.
FILLED_IN = "filled_in_by_layerwise"


class Moving(NamedTuple):
    """A layer that the base optimizer is to move, or has moved."""

    name: str | int
    x: Tensor  # what this process holds of it
    old: Tensor  # what x was, if its group adapts
    group: dict[str, Any]
    cut: norms.Cut


class Layerwise(Wrapper):
    r"""Any optimizer made layerwise: x ← x − η · φ(‖x‖)/‖u‖ · u, where u is the base optimizer's step at rate 1.

    1. The base optimizer takes its step with the learning rate 2⁴⁰, weight decay included: u is what x moves by, over
       2⁴⁰. (At the rate 1 the difference of two weights would lose the digits of a small u.)
    2. The factor φ(‖x‖)/‖u‖ is reckoned, 1 if ‖x‖ or ‖u‖ is zero.
    3. x is set to what it was, minus η times the factor times u.

    Groups with ``adapt=False`` take the base optimizer's own step at its own rate. `Layerwise(torch.optim.AdamW(...))`
    is LAMB, and `Layerwise(torch.optim.SGD(...))` is LARS with the momentum normalised. For those two, `LAMB` and
    `LARS` are faster: here the base optimizer writes weights that are read back, and a copy of the adapted ones is held
    during the step. If the step fails or is interrupted they are put back from it.

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
        innermost = base
        while isinstance(innermost, Wrapper):
            innermost = innermost.base
        name = type(innermost).__name__
        check("base", name, not isinstance(innermost, NOT_LINEAR), "an optimizer linear in its learning rate")
        has_rates = all(group.get("lr") is not None for group in base.param_groups)
        check("base", name, has_rates, "an optimizer with a learning rate for each group")
        check("norm", norm, norm in norms.ORDERS, f"one of {', '.join(map(repr, norms.ORDERS))}")
        check_phi(phi)
        for group in base.param_groups:
            for key in group.pop(FILLED_IN, ()):  # by another Layerwise, around the same base before
                group.pop(key, None)
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
        self._follow_new_groups()
        moving, copies = self._about_to_move()
        try:
            self._take_long_step()
            for x, old, padding in copies:
                if padding is not None:
                    x[padding].copy_(old[padding])
            self._ratios[0] = [self._rescale(layers) for layers in moving]
        except BaseException:  # Ctrl-C too: what has been moved is far away, and somebody may go on from here
            for x, old, _ in copies:
                x.copy_(old)
            raise
        return loss

    def _about_to_move(self) -> tuple[list[list[Moving]], list[tuple[Tensor, Tensor, slice | None]]]:
        """Copy what the base optimizer's step is going to move.

        Returns:
            The layers, device by device; and of each parameter that adapts what this process holds of it, the copy, and
            what of a flat partition is no layer's.
        """
        by_device: dict[torch.device, list[Moving]] = {}
        copies: list[tuple[Tensor, Tensor, slice | None]] = []
        position = self.first_layer
        for group in self.param_groups:
            for x, name in zip(group["params"], names_of(group), strict=True):
                parts = norms.parts(x, name, position)
                position += len(parts)
                if x.grad is None:
                    continue
                old = x
                if group["adapt"]:
                    wide = x.dtype is not torch.float16
                    check("params", x.dtype, wide, "float32 or bfloat16 weights where they adapt")
                    old, segment = x.detach().clone(), parts[-1].segment
                    padding = None if segment is None else slice(segment.stop, None)
                    copies.append((norms.local(x), norms.local(old), padding))
                layers = [Moving(part.name, part.of(x), part.of(old), group, part.cut) for part in parts]
                by_device.setdefault(x.device, []).extend(layers)
        return list(by_device.values()), copies

    def _take_long_step(self) -> None:
        """Let the base optimizer step, adapted groups at the rate `LONG_STEP`."""
        rates = [group["lr"] for group in self.param_groups]
        for group, rate in zip(self.param_groups, rates, strict=True):
            if group["adapt"]:
                group["lr"] = LONG_STEP
                if isinstance(rate, Tensor):
                    group["lr"] = torch.full_like(rate, LONG_STEP, dtype=torch.float32)
        try:
            self.base.step()
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate

    def _rescale(self, layers: list[Moving]) -> tuple[list[str | int], Tensor]:
        """Put the layers of one device where they belong; return their names and trust ratios."""
        measured = [norms.measure([layer.old], self.norm)[0] for layer in layers]
        measured_u = [norms.measure([update(layer)], self.norm)[0] for layer in layers]
        owners = range(len(layers))
        local = torch.stack([norms.join(pieces, owners, self.norm) for pieces in (measured, measured_u)])
        x_norms, u_norms = norms.combine(local, [layer.cut for layer in layers], self.norm).unbind()
        by_group = {id(group): norms.Ratio(group["phi"]) if group["adapt"] else None for group in self.param_groups}
        ratios = norms.trust_ratios(x_norms, u_norms, [by_group[id(layer.group)] for layer in layers])
        for layer, ratio in zip(layers, ratios.unbind(), strict=True):
            if layer.group["adapt"]:
                new = layer.old.to(compute_dtype(layer.x)) - rate_of(layer.group) * ratio * update(layer)
                store_weights([layer.x], [torch.where(ratio.isfinite(), new, layer.old)])
        return [layer.name for layer in layers], ratios

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
        """Return the base optimizer's state dict, but for a φ that is a function; see `LAMB.state_dict`."""
        state_dict = without_functions(super().state_dict())
        for group in state_dict["param_groups"]:
            group.pop(FILLED_IN, None)
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this optimizer, or of the base optimizer alone."""
        own = [{key: group[key] for key in ("phi", "adapt", FILLED_IN)} for group in self.param_groups]
        self.base.load_state_dict(state_dict)
        for group, settings in zip(self.param_groups, own, strict=True):
            group.update(settings | with_own_functions(group, settings))  # what a loaded group lacks stays as it was
        self._follow_base()

    def _follow_base(self) -> None:
        super()._follow_base()
        for group in self.param_groups:
            if group.get("phi") == FUNCTION:  # of a state dict that the base optimizer loaded
                del group["phi"]
            missing = [key for key in ("phi", "adapt") if key not in group]
            group.update({key: self.defaults[key] for key in missing})
            group[FILLED_IN] = [*group.get(FILLED_IN, ()), *missing]
            check_phi(group["phi"])

    def __getstate__(self) -> dict[str, Any]:
        return {"base": self.base, "norm": self.norm, "defaults": self.defaults, "_ratios": [[]]}


def update(layer: Moving) -> Tensor:
    """Return u, by which a step at rate 1 would have moved the layer."""
    dtype = compute_dtype(layer.x)
    return (layer.old.to(dtype) - layer.x.to(dtype)) / LONG_STEP
