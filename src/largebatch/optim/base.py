"""The step that all layerwise adaptive optimizers share: direction -> norms -> apply."""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import backends, norms
from .backends import Layer


class LayerwiseOptimizer(Optimizer):
    """x ← x − η · φ(‖x‖)/‖u‖ · u for each layer x, where the subclass says what the update direction u is.

    "Layer" is one parameter tensor, as in the authors' code. A layer whose ‖x‖ or ‖u‖ is zero takes the plain step
    η·u, and so does every layer of a group with ``adapt=False``.
    """

    rule: ClassVar[str]  # the functions by which the backends move this optimizer's layers
    state_keys: ClassVar[tuple[str, ...]]  # the tensors shaped like the parameter
    counts_steps: ClassVar[bool] = True

    def __init__(self, params: Any, defaults: dict[str, Any], *, norm: str, backend: str) -> None:
        if norm not in norms.ORDERS:
            raise ValueError(f"norm={norm!r}: expected one of {', '.join(map(repr, norms.ORDERS))}")
        self.norm = norm
        self._asked_backend = backend
        self._ratios: dict[str | int, Tensor] = {}
        super().__init__(params, defaults)

    # -- the step --

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Move every layer that has a gradient, and return what ``closure``, if given, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._ratios = {}
        for layers in self._layers_by_device():
            partials, memory = self._backend.direction(self.rule, layers, self.norm)
            x_norms, u_norms = norms.combine(partials, [layer.x for layer in layers], self.norm)
            ratios = self._trust_ratios(x_norms, u_norms, layers)
            self._backend.apply(self.rule, layers, ratios, memory)
            self._ratios.update(zip((layer.name for layer in layers), ratios.unbind(), strict=True))
        return loss

    def _trust_ratios(self, x_norms: Tensor, u_norms: Tensor, layers: list[Layer]) -> Tensor:
        """Return the factor of every layer's step, [L]; neighbours of one group are reckoned together."""
        ratios, start = [], 0
        for stop in range(1, len(layers) + 1):
            group = layers[start].group
            if stop < len(layers) and layers[stop].group is group:
                continue
            span = slice(start, stop)
            adapts = group["adapt"]
            ratios.append(
                self._trust_ratio(x_norms[span], u_norms[span], group) if adapts else torch.ones_like(x_norms[span])
            )
            start = stop
        return torch.cat(ratios)

    def _trust_ratio(self, x_norm: Tensor, u_norm: Tensor, group: dict[str, Any]) -> Tensor:
        return norms.trust_ratio(x_norm, u_norm, group["phi"])

    def trust_ratios(self) -> dict[str | int, Tensor]:
        """Return the trust ratio of every layer that the last step moved.

        The keys are the parameters' names where the optimizer was given names (by `param_groups`, or named
        parameters), otherwise their positions in the order of the groups. The values are 0-D tensors on the layer's
        device: reading them is up to you, and nothing here waits for the device. A layer that does not adapt has 1.
        Empty before the first step; no part of the state dict.
        """
        return dict(self._ratios)

    @property
    def backend(self) -> str:
        """Name the code that moves the layers, of which ``backend="auto"`` left the choice to the optimizer."""
        return self._backend.name

    # -- what a step works on --

    def _layers_by_device(self) -> Iterator[list[Layer]]:
        """Gather the parameters that have a gradient, with their state advanced to the step that is being taken."""
        by_device: dict[torch.device, list[tuple[str | int, Tensor, dict[str, Any]]]] = {}
        position = 0
        for group in self.param_groups:
            known = group.get("param_names", range(position, position + len(group["params"])))
            position += len(group["params"])
            for name, x in zip(known, group["params"], strict=True):
                if x.grad is not None:
                    by_device.setdefault(x.device, []).append((name, x, group))
        for found in by_device.values():
            states = [self._state(x, group) for _, x, group in found]
            times = self._advance(states, [group for *_, group in found])
            made: dict[tuple[int, Any], Any] = {}
            layers = []
            for (name, x, group), state, t in zip(found, states, times, strict=True):
                key = (id(group), t)
                if key not in made:
                    made[key] = self._hyper(group, t)
                assert x.grad is not None
                layers.append(Layer(name, x, x.grad, state, made[key], group))
            yield layers

    def _advance(self, states: list[dict[str, Any]], groups: list[dict[str, Any]]) -> list[Any]:
        """Count the step in every state, and return the counts t as floats (as tensors where capture asks for it)."""
        if not self.counts_steps:
            return [None] * len(states)
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        on_device = torch.compiler.is_compiling() or any(group["capturable"] for group in groups)
        return steps if on_device else torch.stack(steps).tolist()

    def _state(self, x: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """Return a parameter's state, made on first use."""
        if x.grad is not None and x.grad.is_sparse:
            raise ValueError(f"{type(self).__name__} does not take sparse gradients; make the embedding sparse=False")
        state: dict[str, Any] = self.state[x]
        if self.counts_steps and "step" not in state:
            device = x.device if group["capturable"] else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        for key in self.state_keys:
            if key not in state:
                dtype = self._state_dtype(x)
                state[key] = torch.zeros_like(x, dtype=dtype, memory_format=torch.preserve_format)
        return state

    def _state_dtype(self, x: Tensor) -> torch.dtype:
        return backends.compute_dtype(x)

    def _hyper(self, group: dict[str, Any], t: Any) -> Any:
        """Return the rule's numbers for a layer of ``group`` at its t-th step."""
        raise NotImplementedError

    # -- construction --

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError for a setting out of range."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; see `torch.optim.Optimizer.add_param_group`."""
        if isinstance(param_group, dict):
            self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        params = [x for group in self.param_groups for x in group["params"]]
        for x in params:
            if x.is_complex():
                raise ValueError(f"params: {type(self).__name__} does not take complex parameters, got {x.dtype}")
        self._backend = backends.choose(self._asked_backend, self.rule, params)


def check(name: str, value: Any, accepted: bool, expected: str) -> None:
    """Raise ValueError naming the argument, its value and what is accepted, unless ``accepted``."""
    if not accepted:
        raise ValueError(f"{name}={value!r}: expected {expected}")


def check_common(group: dict[str, Any]) -> None:
    """Check the settings that every layerwise optimizer has."""
    lr, phi = group["lr"], group["phi"]
    if isinstance(lr, Tensor):
        check("lr", lr, lr.numel() == 1, "a number >= 0 or a tensor of one element")
    else:
        check("lr", lr, lr >= 0, "a number >= 0")
    check("weight_decay", group["weight_decay"], group["weight_decay"] >= 0, "a number >= 0")
    check("eps", group["eps"], group["eps"] >= 0, "a number >= 0")
    if phi is not None and not callable(phi):
        pair = isinstance(phi, (tuple, list)) and len(phi) == 2 and 0 <= phi[0] <= phi[1]
        check("phi", phi, pair, "None, a pair (low, high) with 0 <= low <= high, or a callable")
