"""The seam between an optimizer and the code that moves its layers, and the choice among such backends.

A backend is handed all layers of a step at once and answers two calls, between which the norms are reduced over
processes: ``direction`` advances the state and measures x and u, ``apply`` moves x along u. Where there is nothing to
reduce it may do all of that in one call, ``step``. Its contract is equality with `reference`, in parameters and in
state.
"""

import importlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import norms
from .checks import check_dense
from .precision import WHOLE, Origin


@dataclass(slots=True, eq=False)
class Layer:
    """What this process holds of one parameter that has a gradient, with all that one step of it takes.

    The tensors are plain ones, also where the parameter is distributed. A `LayerwiseOptimizer` keeps the layers from
    step to step where it can; the fields below the line are set anew each time, by `Layers.spread`.
    """

    name: str | int
    position: int  # among all layers of the optimizer, in the order of the groups
    x: Tensor  # the weights that the mathematics moves: the parameter, or its float32 master copy
    rounded: Tensor | None  # the parameter, if x is its master copy
    state: dict[str, Tensor]  # the tensors of the rule's state, without the step count
    cut: tuple[Any, ...] = ()  # `norms.Cut`; not empty if other processes hold the rest of the layer
    origin: Origin = WHOLE  # where in the layer these elements lie, if the state is rounded by chance
    # ----
    g: Tensor = field(init=False)
    hyper: Any = field(init=False)  # the rule's numbers at this step; layers that have the same share the object
    ratio: norms.Ratio | None = field(init=False)  # shared by the group's layers; None if they do not adapt


class Run(NamedTuple):
    """What neighbouring layers share."""

    hyper: Any
    ratio: norms.Ratio | None
    num_layers: int


@dataclass(slots=True, eq=False)
class Steps:
    """Step counts: the same object from step to step until one of them is another."""

    tensors: list[Tensor] = field(default_factory=list)
    memo: Any = None  # as that of `Layers`


class Scaling(NamedTuple):
    """What a gradient scaler says of a step without waiting for the device. The tensors are 0-D."""

    scale: Tensor | float  # that the gradients are yet to be divided by
    found_inf: Tensor  # other than 0 if the step is not to be taken


class Layers(list[Layer]):
    """The layers of one step on one device: the same object from step to step until one of them is another."""

    def __init__(self, layers: Iterable[Layer] = ()) -> None:
        super().__init__(layers)
        self.whole = True  # whether this process holds all of each
        self.memo: Any = None  # what a backend derives from them, and wants to find again
        self.grads: list[Tensor] = []  # of this step
        self.runs: list[Run] = []  # of this step: together they cover all layers
        self.scaling: Scaling | None = None  # of this step's gradients, where the backend `takes_scaling`

    def spread(self) -> None:
        """Give every layer its gradient and numbers of this step."""
        check_dense(self.grads)
        shared = chain.from_iterable(repeat(run, run.num_layers) for run in self.runs)
        for layer, g, run in zip(self, self.grads, shared, strict=True):
            layer.g, layer.hyper, layer.ratio = g, run.hyper, run.ratio

    def release(self) -> None:
        """Let go of the gradients, whose memory the next backward pass may want."""
        if self.grads and hasattr(self[0], "g"):
            for layer in self:
                del layer.g
        self.grads, self.runs = [], []


class Backend:
    """What an optimizer asks of a backend."""

    name: str
    compiles = True  # whether `torch.compile` can trace it
    takes_scaling = False  # whether it heeds `Layers.scaling`
    by_layer = True  # whether it reads the fields of each layer; else it reads `Layers.grads` and `Layers.runs`

    def refuses(self, rule: str, params: Sequence[Tensor]) -> str | None:
        """Say why this backend cannot move these parameters by this rule; None if it can."""
        return None

    def count(self, steps: Steps) -> list[float]:
        """Add one to step counts that the host holds, and return what they have become."""
        torch._foreach_add_(steps.tensors, 1)
        times: list[float] = torch.stack(steps.tensors).tolist()
        return times

    def step(self, rule: str, layers: Layers, norm: str) -> Tensor | None:
        """Take the whole step of layers that this process holds whole, and round the masters.

        Returns:
            The trust ratios, [L]; or None if nothing was done, and the two calls below are what to use.
        """
        return None

    def direction(self, rule: str, layers: Layers, norm: str) -> tuple[Tensor, Any]:
        """Advance the state, form u, leave x alone.

        An element of g whose square is not finite counts as 0, and makes the norm of its layer's u NaN.

        Returns:
            What this process holds of the norms of x and of u, [2, L], as `norms.join` makes it; and whatever `apply`
            of the same backend wants to be handed.
        """
        raise NotImplementedError

    def apply(self, rule: str, layers: Layers, ratio: Tensor, memory: Any) -> None:
        """Move every x along its u, by the learning rate times ``ratio``, [L]; leave the layers whose ratio is NaN."""
        raise NotImplementedError


BACKENDS = ("reference", "foreach", "native", "triton")


def load(name: str) -> Backend:
    """Import the backend of this name, which only then has to be there; ValueError says why if it is not."""
    try:
        module = importlib.import_module(f"{__package__}.{name}")
    except ImportError as error:
        raise ValueError(f"backend={name!r} is not available here: {error}") from error
    backend: Backend = module.BACKEND
    return backend


def choose(name: str, rule: str, params: Sequence[Tensor]) -> Backend:
    """Return the backend asked for, or for "auto" the fastest that can move all of ``params``.

    Raises:
        ValueError: an unknown name, or a backend that was asked for by name and cannot serve; the message says why.
    """
    if name == "auto":
        native = _native()
        if native is not None and params and native.refuses(rule, params) is None:
            return native
        # On the CPU too: 109.5M parameters of BERT-base took 1.3 s by tiles that stay in cache, 12 s one whole tensor
        # at a time, where the page faults of its temporaries dominate (2 Zen 3 cores, torch 2.13, 2026-11-21).
        return load("foreach")
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r}: expected one of 'auto', {', '.join(map(repr, BACKENDS))}")
    backend = load(name)
    reason = backend.refuses(rule, params)
    if reason is not None:
        raise ValueError(f"backend={name!r} cannot serve here: {reason}")
    return backend


@cache
def _native() -> Backend | None:
    """Return the CPU kernel, or say once that it is missing."""
    try:
        return load("native")
    except ValueError as error:
        logging.getLogger(__name__).warning(
            "CPU optimizers run on torch operations, several times slower: %s", error.__cause__ or error
        )
        return None
