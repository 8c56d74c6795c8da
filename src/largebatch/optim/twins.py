"""Twins of an optimizer: of its kind, its settings and its state, over one of its parameters or over copies of some.

What moves a layer at another moment than the optimizer's own step (`in_backward`), or in another place (`offload`), is
a twin, so that the mathematics, the backends and the state dict are the optimizer's.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from . import norms
from .checks import check
from .gather import names_of
from .layerwise import Layerwise


class Member(NamedTuple):
    """A parameter of the optimizer, and what its twin moves."""

    group: int  # whose parameter it is
    place: int  # within the group
    first_layer: int  # how many layers come before it
    x: Tensor
    moved: Tensor  # x itself, or a copy


class Twin:
    """An optimizer like another one, over some of its parameters.

    Args:
        optimizer: whose groups, state and settings are in force at every step.
        members: neighbours in the order of the optimizer's groups.
    """

    def __init__(self, optimizer: Optimizer, members: Sequence[Member]) -> None:
        self.original = optimizer
        self.members = members
        groups: dict[int, dict[str, Any]] = {}
        for member in members:
            group = optimizer.param_groups[member.group]
            own = groups.setdefault(member.group, {**group, "params": []})
            name = names_of(group)[member.place]
            if name is not None:
                own["param_names"] = [*(own["param_names"] if own["params"] else []), name]
            own["params"].append(member.moved)
        self.groups = groups
        self.optimizer = alike(optimizer, list(groups.values()))
        self.optimizer.first_layer = members[0].first_layer

    def step(self) -> None:
        """Move the members that have a gradient, by the settings and from the state of this moment."""
        for number, own in self.groups.items():
            group = self.original.param_groups[number]
            own.update({key: group[key] for key in group if key not in ("params", "param_names")})
        theirs, mine = self.original.state, self.optimizer.state
        for member in self.members:  # the state is the same dict, whoever has replaced or cleared it
            if member.x in theirs:
                mine[member.moved] = theirs[member.x]
            else:
                mine.pop(member.moved, None)
        self.optimizer.step()
        for member in self.members:
            if member.moved in mine:
                theirs[member.x] = mine[member.moved]


def alike(optimizer: Optimizer, groups: list[dict[str, Any]]) -> Any:
    """Return an optimizer of this kind and these settings over ``groups``, without its state and its hooks."""
    if isinstance(optimizer, Layerwise):
        state = optimizer.__getstate__() | {"base": alike(optimizer.base, groups)}
    else:
        state = optimizer.__getstate__() | {"param_groups": groups, "state": defaultdict(dict)}
    made: Any = object.__new__(type(optimizer))
    made.__setstate__(state)
    return made


def members_of(optimizer: Optimizer) -> Iterator[Member]:
    """List the parameters of an optimizer, each as its own twin would move it."""
    check(
        "optimizer", type(optimizer).__name__, not isinstance(optimizer, LBFGS), "one that moves each layer by itself"
    )
    first_layer = 0
    for number, group in enumerate(optimizer.param_groups):
        for place, x in enumerate(group["params"]):
            yield Member(number, place, first_layer, x, x)
            first_layer += len(norms.parts(x, None, first_layer))
