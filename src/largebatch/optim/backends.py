"""The seam between an optimizer and the code that moves its layers, and the choice among such backends.

A backend is handed all layers of a step at once and answers two calls, between which the norms are reduced over
processes: ``direction`` advances the state and measures x and u, ``apply`` moves x along u. Its contract is equality
with `reference`, in parameters and in state.
"""

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from .precision import WHOLE, Origin


class Layer(NamedTuple):
    """What this process holds of one parameter that has a gradient, with all that one step of it takes.

    The tensors are plain ones, also where the parameter is distributed.
    """

    name: str | int
    position: int  # among all layers of the optimizer, in the order of the groups
    x: Tensor  # the weights that the mathematics moves: the parameter, or its float32 master copy
    g: Tensor
    state: dict[str, Tensor]  # the tensors of the rule's state, without the step count
    hyper: Any  # the rule's numbers at this step; layers that have the same numbers share the object
    group: dict[str, Any]
    cut: tuple[Any, ...] = ()  # `norms.Cut`; not empty if other processes hold the rest of the layer
    origin: Origin = WHOLE  # where in the layer these elements lie, if the state is rounded by chance


class Backend(Protocol):
    """What an optimizer asks of a backend."""

    name: str

    def refuses(self, rule: str, params: Sequence[Tensor]) -> str | None:
        """Say why this backend cannot move these parameters by this rule; None if it can."""

    def direction(self, rule: str, layers: Sequence[Layer], norm: str) -> tuple[Tensor, Any]:
        """Advance the state, form u, leave x alone.

        An element of g whose square is not finite counts as 0, and makes the norm of its layer's u NaN.

        Returns:
            What this process holds of the norms of x and of u, [2, L], as `norms.join` makes it; and whatever `apply`
            of the same backend wants to be handed.
        """

    def apply(self, rule: str, layers: Sequence[Layer], ratio: Tensor, memory: Any) -> None:
        """Move every x along its u, by the learning rate times ``ratio``, [L]; leave the layers whose ratio is NaN."""


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
