"""What a step works on: the layers, gathered from an optimizer's groups and state, and kept from step to step.

Over thousands of small layers it takes longer to gather them than to move them. As long as the parameters, the groups
and the state are the same objects, only gradients and numbers are new.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import norms
from .backends import Backend, Layer, Layers
from .checks import check

if TYPE_CHECKING:
    from .base import LayerwiseOptimizer

Grads = Sequence[Tensor | None]  # of all parameters, in the order of the groups
Sources = list[list[Any]]


class Members(NamedTuple):
    """The parameters of a group that have a gradient."""

    group: dict[str, Any]
    params: list[Tensor]
    parts: list[list[norms.Part]]  # of each parameter: one, but for flat partitions
    layers: list[Layer]  # one for each part
    steps: list[Tensor]  # the parameters' step counts, if the rule has them

    def with_parts(self) -> Iterator[tuple[Tensor, list[norms.Part]]]:
        """Return pairs of a parameter and its parts."""
        return zip(self.params, self.parts, strict=True)


class Gathered:
    """All layers of a step, and what they were gathered from."""

    def __init__(self, optimizer: "LayerwiseOptimizer", grads: Grads) -> None:
        self.by_device: dict[torch.device, Layers] = {}
        self.by_group: list[Members] = []
        position = 0
        for group in optimizer.param_groups:
            optimizer._init_group(group)
            members = Members(group, [], [], [], [])
            names = group.get("param_names", [None] * len(group["params"]))
            for x, name in zip(group["params"], names, strict=True):
                parts = norms.parts(x, name, position, with_origin=optimizer.state_dtype is torch.bfloat16)
                position += len(parts)
                if x.grad is not None:
                    self._add(members, x, parts, optimizer)
            self.by_group.append(members)
        # What this process holds of a distributed parameter may be exchanged unseen.
        self.keeps = all(
            len(parts) == 1 and parts[0].of(x) is x for members in self.by_group for x, parts in members.with_parts()
        )
        self.sources = sources(optimizer, grads) if self.keeps else []

    def _add(self, members: Members, x: Tensor, parts: list[norms.Part], optimizer: "LayerwiseOptimizer") -> None:
        state = optimizer.state[x]
        layers = self.by_device.setdefault(x.device, Layers())
        for part in parts:
            tensors = {key: part.of(state[key]) for key in optimizer.state_keys}
            weights, rounded = part.of(x), None
            if "master_param" in state:
                weights, rounded = part.of(state["master_param"]), weights
            layer = Layer(part.name, part.position, weights, rounded, tensors, part.cut, part.origin)
            layers.append(layer)
            layers.whole &= not part.cut
            members.layers.append(layer)
        members.params.append(x)
        members.parts.append(parts)
        if optimizer.counts_steps:
            step, device = state["step"], step_device(x, members.group)
            as_kept = step.dtype is torch.float32 and step.device == device
            check("step", step, as_kept, f"a float32 tensor on {device}")
            members.steps.append(step)

    def is_of(self, optimizer: "LayerwiseOptimizer", grads: Grads) -> bool:
        """Say whether gathering would find the same objects again."""
        found = sources(optimizer, grads)
        return self.keeps and all(
            len(old) == len(new) and all(map(is_, old, new)) for old, new in zip(self.sources, found, strict=True)
        )

    def fill(self, optimizer: "LayerwiseOptimizer", grads: Grads, backend: Backend) -> None:
        """Give every layer its gradient, and count the step in its numbers."""
        if self.keeps:
            found = iter([g for g in grads if g is not None])
        else:
            found = iter(norms.gradients([x for members in self.by_group for x in members.params]))
        for members in self.by_group:
            own, numbers = list(islice(found, len(members.params))), hypers(optimizer, members, backend)
            if not self.keeps:
                numbers = [hyper for hyper, parts in zip(numbers, members.parts, strict=True) for _ in parts]
                own = [part.of(g) for g, parts in zip(own, members.parts, strict=True) for part in parts]
            ratio = optimizer._ratio(members.group) if members.group["adapt"] else None
            for layer, g, hyper in zip(members.layers, own, numbers, strict=True):
                layer.g = g
                layer.hyper = hyper
                layer.ratio = ratio


def sources(optimizer: "LayerwiseOptimizer", grads: Grads) -> Sources:
    """List all objects that layers are gathered from."""
    states = list(optimizer.state.values())
    keys = (*optimizer.state_keys, "step", "master_param")
    params = [x for group in optimizer.param_groups for x in group["params"]]
    of_states = [[state.get(key) for state in states] for key in keys]
    return [list(optimizer.param_groups), params, [g is None for g in grads], states, *of_states]


def hypers(optimizer: "LayerwiseOptimizer", members: Members, backend: Backend) -> list[Any]:
    """Count the step of every parameter of a group, and return the rule's numbers for it."""
    group, steps = members.group, members.steps
    if not steps:
        return [optimizer._hyper(group, None)] * len(members.params) if members.params else []
    if group["capturable"] or torch.compiler.is_compiling():
        torch._foreach_add_(steps, 1)
        together = torch.stack(steps).to(norms.total_dtype(steps[0].device))  # one kernel for each number, not n
        hyper = optimizer._hyper(group, together)
        columns = [
            number.expand_as(together).unbind() if isinstance(number, Tensor) else [number] * len(steps)
            for number in hyper
        ]
        return [type(hyper)(*row) for row in zip(*columns, strict=True)]
    times = backend.count(steps)
    distinct = {t: optimizer._hyper(group, t) for t in set(times)}
    return [distinct[t] for t in times]


def step_device(x: Tensor, group: dict[str, Any]) -> torch.device:
    """Return where the step count of a layer lives: on the host, unless a CUDA graph is to hold the step."""
    return x.device if group["capturable"] else torch.device("cpu")
