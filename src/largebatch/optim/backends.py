"""The seam between an optimizer and the code that moves its layers, and the choice among such backends.

A backend is handed every layer of a step at once and answers two calls, between which the norms are reduced:
``direction`` advances the state and reports the norms of x and u; ``apply`` moves x along u. What it must equal,
parameters and state, is `reference`.
"""

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Layer(NamedTuple):
    """One parameter that has a gradient, with all that one step of it needs."""

    name: str | int
    x: Tensor
    g: Tensor
    state: dict[str, Tensor]
    hyper: Any  # the rule's numbers for this step, such as `lamb.Hyper`; layers that share them share the object
    group: dict[str, Any]


class Backend(Protocol):
    """What an optimizer asks of a backend."""

    name: str

    def refuses(self, rule: str, params: Sequence[Tensor]) -> str | None:
        """Say why this backend cannot move these parameters by this rule; None if it can."""

    def direction(self, rule: str, layers: Sequence[Layer], norm: str) -> tuple[Tensor, Any]:
        """Advance the state, form u, and return ([2, L] partial norms of x and u, whatever `apply` wants to be given).

        Leaves x alone. "Partial" as in `norms.partial`: of what this process holds.
        """

    def apply(self, rule: str, layers: Sequence[Layer], ratio: Tensor, memory: Any) -> None:
        """Move every x along its u, scaled by ``ratio`` [L] and the learning rate."""


MODULES = {name: f"{__package__}.{name}" for name in ("reference", "foreach", "native", "triton")}


def load(name: str) -> Backend:
    """Import the backend of this name; ValueError says why where that fails."""
    try:
        module = importlib.import_module(MODULES[name])
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
        foreach = load("foreach")
        return foreach if foreach.refuses(rule, params) is None else load("reference")
    if name not in MODULES:
        raise ValueError(f"backend={name!r}: expected one of 'auto', {', '.join(map(repr, MODULES))}")
    backend = load(name)
    reason = backend.refuses(rule, params)
    if reason is not None:
        raise ValueError(f"backend={name!r} cannot serve here: {reason}")
    return backend


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a layer's mathematics is done: float32, or x's own where that is wider."""
    return torch.promote_types(x.dtype, torch.float32)
