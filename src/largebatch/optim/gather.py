"""What a step works on: the layers, gathered from an optimizer's groups and state, and kept from step to step.

Over thousands of small layers it takes longer to gather them than to move them. As long as the parameters, the groups
and the state are the same objects, only gradients and numbers are new.
"""

from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import norms
from .backends import Backend, Layer, Layers, Run, Scaling, Steps
from .checks import check, check_dense

if TYPE_CHECKING:
    from .base import LayerwiseOptimizer

Grads = Sequence[Tensor | None]  # of all parameters, in the order of the groups
END = (object(),)


class Members(NamedTuple):
    """The parameters of a group that have a gradient and are on one device."""

    group: dict[str, Any]
    target: Layers  # their layers are the next of these
    places: list[int]  # of each parameter among all that have a gradient
    params: list[Tensor]
    parts: list[list[norms.Part]]  # of each parameter: one, but for flat partitions
    steps: Steps  # the parameters' step counts, if the rule has them


class Gathered:
    """All layers of a step, and what they were gathered from."""

    def __init__(self, optimizer: "LayerwiseOptimizer", grads: Grads) -> None:
        check_dense(grads)
        self.by_device: dict[torch.device, Layers] = {}
        self.members: list[Members] = []
        self.keeps = True  # not of distributed parameters: what this process holds of those may be exchanged unseen
        num_layers, num_found = optimizer.first_layer, 0
        for group in optimizer.param_groups:
            optimizer._init_group(group)
            of_device: dict[torch.device, Members] = {}
            for x, name in zip(group["params"], names_of(group), strict=True):
                parts = norms.parts(x, name, num_layers, with_origin=optimizer.state_dtype is torch.bfloat16)
                num_layers += len(parts)
                if x.grad is None:
                    continue
                if x.device not in of_device:
                    target = self.by_device.setdefault(x.device, Layers())
                    of_device[x.device] = Members(group, target, [], [], [], Steps())
                members = of_device[x.device]
                members.places.append(num_found)
                members.params.append(x)
                members.parts.append(parts)
                self._add(members, optimizer)
                num_found += 1
            self.members.extend(of_device.values())
        self.keeps &= all(isinstance(state, dict) for state in optimizer.state.values())  # torch allows others
        self.sources = list(sources(optimizer, grads)) if self.keeps else []

    def _add(self, members: Members, optimizer: "LayerwiseOptimizer") -> None:
        """Make the layers of the last of these parameters."""
        x, parts, layers = members.params[-1], members.parts[-1], members.target
        state = optimizer.state[x]
        for part in parts:
            tensors = {key: part.of(state[key]) for key in optimizer.state_keys}
            weights, rounded = part.of(x), None
            if "master_param" in state:
                weights, rounded = part.of(state["master_param"]), weights
            layers.append(Layer(part.name, part.position, weights, rounded, tensors, part.cut, part.origin))
            layers.whole &= not part.cut
        self.keeps &= len(parts) == 1 and parts[0].of(x) is x
        if optimizer.counts_steps:
            step, device = state["step"], step_device(x, members.group)
            as_kept = isinstance(step, Tensor) and step.dtype is torch.float32 and step.device == device
            check("step", step, as_kept, f"a float32 tensor on {device}")
            members.steps.tensors.append(step)

    def is_of(self, optimizer: "LayerwiseOptimizer", grads: Grads) -> bool:
        """Say whether gathering would find the same objects again."""
        try:
            return self.keeps and all(map(is_, self.sources, sources(optimizer, grads)))
        except TypeError:  # a state that is none
            return False

    def fill(self, optimizer: "LayerwiseOptimizer", grads: Grads, backend: Backend) -> None:
        """Give all layers their gradients, and count the step in their numbers."""
        for layers in self.by_device.values():
            layers.grads, layers.runs = [], []
            layers.scaling = scaling_of(optimizer, layers[0].x.device)
        found = [g for g in grads if g is not None]
        if not self.keeps:
            found = norms.gradients(
                [x for group in optimizer.param_groups for x in group["params"] if x.grad is not None]
            )
        for group, layers, places, _, parts, steps in self.members:
            ratio = optimizer._ratio(group) if group["adapt"] else None
            own = [found[i] for i in places]
            numbers = hypers(optimizer, group, steps, layers.scaling, len(places), backend)
            if self.keeps:
                layers.grads += own
                layers.runs += [Run(hyper, ratio, count) for hyper, count in numbers]
            else:
                layers.grads += [part.of(g) for g, of_one in zip(own, parts, strict=True) for part in of_one]
                each = chain.from_iterable(repeat(hyper, count) for hyper, count in numbers)
                layers.runs += [Run(hyper, ratio, len(of_one)) for hyper, of_one in zip(each, parts, strict=True)]


def names_of(group: dict[str, Any]) -> Sequence[str | None]:
    """Return the names of a group's parameters, None for each if they have none.

    Nor have they where torch's `ZeroRedundancyOptimizer` left a process some of the parameters and the names of all.
    """
    params, names = group["params"], group.get("param_names")
    return names if names is not None and len(names) == len(params) else [None] * len(params)


def sources(optimizer: "LayerwiseOptimizer", grads: Grads) -> Iterator[Any]:
    """Go through all objects that layers are gathered from, and an end behind those of each kind."""
    groups = optimizer.param_groups
    params = [each for group in groups for each in (group["params"], END)]
    tensors = chain.from_iterable(map(dict.values, optimizer.state.values()))
    return chain.from_iterable((groups, END, *params, map(is_, grads, repeat(None)), tensors, END))


def scaling_of(optimizer: "LayerwiseOptimizer", device: torch.device) -> Scaling | None:
    """Return what `torch.amp.GradScaler` left at an optimizer that skips steps by itself."""
    found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    if found_inf is None or not optimizer._step_supports_amp_scaling:
        return None
    found_inf = found_inf.to(device, non_blocking=True).reshape(())
    return Scaling(1.0 if scale is None else scale.to(device, non_blocking=True).reshape(()), found_inf)


def hypers(
    optimizer: "LayerwiseOptimizer",
    group: dict[str, Any],
    steps: Steps,
    scaling: Scaling | None,
    count: int,
    backend: Backend,
) -> list[tuple[Any, int]]:
    """Count the step of ``count`` parameters of a group; return the rule's numbers, and how many neighbours have them.

    ``steps`` are the parameters' step counts, none if the rule has no such thing.
    """
    if not steps.tensors:
        return [(optimizer._hyper(group, None), count)]
    if group["capturable"] or torch.compiler.is_compiling():
        torch._foreach_add_(steps.tensors, 1 if scaling is None else (scaling.found_inf == 0).float())
        together = torch.stack(steps.tensors).to(
            norms.total_dtype(steps.tensors[0].device)
        )  # one kernel for each number, not n
        hyper = optimizer._hyper(group, together)
        columns = [
            number.expand_as(together).unbind() if isinstance(number, Tensor) else [number] * count for number in hyper
        ]
        return [(type(hyper)(*row), 1) for row in zip(*columns, strict=True)]
    times = backend.count(steps)
    if times.count(times[0]) == len(times):
        return [(optimizer._hyper(group, times[0]), count)]
    distinct = {t: optimizer._hyper(group, t) for t in set(times)}
    return [(distinct[t], 1) for t in times]


def step_device(x: Tensor, group: dict[str, Any]) -> torch.device:
    """Return where the step count of a layer lives: on the host, unless a CUDA graph is to hold the step."""
    return x.device if group["capturable"] else torch.device("cpu")
