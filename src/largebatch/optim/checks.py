"""Settings out of range are refused by name, with the value and with what is accepted."""

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor


def check(name: str, value: Any, accepted: bool, expected: str) -> None:
    """Raise ValueError unless ``accepted``."""
    if not accepted:
        raise ValueError(f"{name}={value!r}: expected {expected}")


def check_common(group: dict[str, Any]) -> None:
    """Check the settings that every layerwise optimizer has."""
    lr = group["lr"]
    if isinstance(lr, Tensor):  # whose value is on its device, and stays there
        check("lr", lr, lr.numel() == 1, "a number >= 0, or a tensor of one element")
    else:
        check("lr", lr, 0 <= lr < math.inf, "a number >= 0")
    for name in ("weight_decay", "eps"):
        check(name, group[name], 0 <= group[name] < math.inf, "a number >= 0")
    check_phi(group["phi"])


def check_phi(phi: Any) -> None:
    """Check φ."""
    check("phi", phi, phi is None or callable(phi) or is_interval(phi), "None, a pair (low, high), or a callable")


def check_shape(what: str, name: str | int, tensor: Tensor, x: Tensor) -> None:
    """Refuse what belongs to a parameter of another shape, as after a change of the model."""
    if tensor.shape != x.shape:
        shapes = list(tensor.shape), list(x.shape)
        raise ValueError(f"the {what} of parameter {name!r} has the shape {shapes[0]}, and the parameter {shapes[1]}")


def check_dense(grads: Iterable[Tensor | None]) -> None:
    """Refuse sparse gradients."""
    if any(g is not None and g.is_sparse for g in grads):
        raise ValueError("sparse gradients are not supported: make the embedding dense")


def is_interval(pair: Any) -> bool:
    """Say whether this is a pair of numbers 0 <= low <= high."""
    return isinstance(pair, tuple | list) and len(pair) == 2 and 0 <= pair[0] <= pair[1]
