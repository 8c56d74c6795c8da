"""The executable specification: one layer at a time, the paper's symbols, nothing clever.

A rule is three free functions, tensors in and tensors out: how the state advances, which direction u it points in, and
how x descends along u. ``h`` holds the rule's numbers, `lamb.Hyper` or `lars.Hyper`. Every other backend must equal
this one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import norms
from .backends import Backend, Layer, Layers
from .precision import compute_dtype, store, store_weights

State = dict[str, Tensor]


def lamb_state(x: Tensor, g: Tensor, state: State, h: Any) -> State:
    m, v = state["exp_avg"], state["exp_avg_sq"]
    m = h.beta1 * m + (1 - h.beta1) * g  # m_t = β₁ m_{t−1} + (1 − β₁) g_t
    v = h.beta2 * v + (1 - h.beta2) * g**2  # v_t = β₂ v_{t−1} + (1 − β₂) g_t²
    return {"exp_avg": m, "exp_avg_sq": v}


def lamb_direction(x: Tensor, g: Tensor, state: State, h: Any) -> tuple[Tensor, Tensor]:
    m, v = state["exp_avg"], state["exp_avg_sq"]
    m_hat = h.m_scale * m + h.g_scale * g  # m̂_t = m_t / (1 − β₁ᵗ), and more of g_t in N-LAMB
    v_hat = h.v_scale * v + h.g_sq_scale * g**2  # v̂_t = v_t / (1 − β₂ᵗ), and more of g_t² in NN-LAMB
    r = m_hat / (v_hat.sqrt() + h.eps)  # r_t = m̂_t / (√v̂_t + ε)
    u = r + h.weight_decay * x  # r_t + λ x_t
    return u, u


def lars_state(x: Tensor, g: Tensor, state: State, h: Any) -> State:
    m = state["momentum_buffer"]
    m = h.momentum * m + (1 - h.momentum) * (g + h.weight_decay * x)  # m_t = β m_{t−1} + (1 − β)(g_t + λ x_t)
    return {"momentum_buffer": m}


def lars_direction(x: Tensor, g: Tensor, state: State, h: Any) -> tuple[Tensor, Tensor]:
    m = state["momentum_buffer"]
    u = h.momentum * m + (1 - h.momentum) * (g + h.weight_decay * x) if h.nesterov else m
    return u, u


def lars2017_state(x: Tensor, g: Tensor, state: State, h: Any) -> State:
    return state  # the momentum waits for the ratio


def lars2017_direction(x: Tensor, g: Tensor, state: State, h: Any) -> tuple[Tensor, Tensor]:
    u = g + h.weight_decay * x
    return u, g  # ‖g‖ is what enters the ratio


def descend(x: Tensor, u: Tensor, ratio: Tensor, state: State, h: Any) -> tuple[Tensor, State]:
    x = x - h.rate * ratio * u  # x_{t+1} = x_t − η_t φ(‖x_t‖)/‖u_t‖ · u_t
    return x, state


def lamb_descend(x: Tensor, u: Tensor, ratio: Tensor, state: State, h: Any) -> tuple[Tensor, State]:
    return descend(h.keep * x, u, ratio, state, h)  # keep = 1 − η λ if the decay is decoupled, else 1


def lars2017_descend(x: Tensor, u: Tensor, ratio: Tensor, state: State, h: Any) -> tuple[Tensor, State]:
    b = state["momentum_buffer"]
    b = h.momentum * b + ratio * u  # b_t = β b_{t−1} + r_t (g_t + λ x_t)
    x = x - h.rate * (ratio * u + h.momentum * b if h.nesterov else b)  # x_{t+1} = x_t − η_t b_t
    return x, {"momentum_buffer": b}


class Rule(NamedTuple):
    """What a rule does to a layer."""

    state: Callable[[Tensor, Tensor, State, Any], State]
    direction: Callable[[Tensor, Tensor, State, Any], tuple[Tensor, Tensor]]  # u, and what is measured beside x
    descend: Callable[[Tensor, Tensor, Tensor, State, Any], tuple[Tensor, State]]


RULES = {
    "lamb": Rule(lamb_state, lamb_direction, lamb_descend),
    "lars": Rule(lars_state, lars_direction, descend),
    "lars2017": Rule(lars2017_state, lars2017_direction, lars2017_descend),
}


class Reference(Backend):
    """The backend that applies the functions above to one layer after another."""

    name = "reference"

    def direction(self, rule: str, layers: Layers, norm: str) -> tuple[Tensor, list[Tensor]]:
        updates: list[Tensor] = []
        measured: list[list[Tensor]] = [[], []]
        for layer in layers:
            x, g = widen(layer)
            usable = g.square().isfinite()
            g = torch.where(usable, g, 0.0)
            write(layer, RULES[rule].state(x, g, read(layer), layer.hyper))
            u, normaliser = RULES[rule].direction(x, g, read(layer), layer.hyper)
            updates.append(u)
            measured[0] += norms.measure([x], norm)
            measured[1] += norms.measure([torch.where(usable, normaliser, torch.nan)], norm)
        owners = range(len(layers))
        return torch.stack([norms.join(pieces, owners, norm) for pieces in measured]), updates

    def apply(self, rule: str, layers: Layers, ratio: Tensor, memory: list[Tensor]) -> None:
        for layer, u, r in zip(layers, memory, ratio.unbind(), strict=True):
            x, _ = widen(layer)
            old, moves = {"x": x, **read(layer)}, r.isfinite()
            x, state = RULES[rule].descend(x, u, r, read(layer), layer.hyper)
            store_weights([layer.x], [torch.where(moves, x, old["x"])])
            write(layer, {key: torch.where(moves, value, old[key]) for key, value in state.items()})


def widen(layer: Layer) -> tuple[Tensor, Tensor]:
    """Return x and the gradient to descend, in the dtype of the mathematics."""
    dtype = compute_dtype(layer.x)
    g = layer.g.to(dtype)
    return layer.x.to(dtype), -g if layer.hyper.maximize else g


def read(layer: Layer) -> State:
    """Return the state in the dtype of the mathematics."""
    return {key: value.to(compute_dtype(layer.x)) for key, value in layer.state.items()}


def write(layer: Layer, state: State) -> None:
    """Put the new state in the old one's place."""
    for which, (key, value) in enumerate(state.items()):
        store(layer.state[key], value, layer, which)


BACKEND = Reference()
