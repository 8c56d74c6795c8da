"""The executable specification: one layer at a time, the paper's symbols, nothing clever.

Each rule is one or two free functions, tensors in and tensors out. Every other backend must equal this one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import norms
from .backends import Layer, compute_dtype

State = dict[str, Tensor]


def lamb(x: Tensor, g: Tensor, state: State, h: Any) -> tuple[Tensor, Tensor, State]:
    """Algorithm 2: u = m̂ / (√v̂ + ε) + λx, which is also what is normalised; the new moments."""
    m = h.beta1 * state["exp_avg"] + (1 - h.beta1) * g  # m_t = β₁ m_{t−1} + (1−β₁) g_t
    v = h.beta2 * state["exp_avg_sq"] + (1 - h.beta2) * g * g  # v_t = β₂ v_{t−1} + (1−β₂) g_t²
    m_hat = h.m_scale * m + h.g_scale * g
    v_hat = h.v_scale * v + h.g_sq_scale * g * g
    r = m_hat / (v_hat.sqrt() + h.eps)  # r_t
    u = r + h.weight_decay * x
    return u, u, {"exp_avg": m, "exp_avg_sq": v}


def lars(x: Tensor, g: Tensor, state: State, h: Any) -> tuple[Tensor, Tensor, State]:
    """Algorithm 1: u = m_t, the momentum of g + λx, which is also what is normalised."""
    d = g + h.weight_decay * x
    m = h.momentum * state["momentum_buffer"] + (1 - h.momentum) * d  # m_t = β m_{t−1} + (1−β)(g_t + λx_t)
    u = h.momentum * m + (1 - h.momentum) * d if h.nesterov else m
    return u, u, {"momentum_buffer": m}


def lars2017(x: Tensor, g: Tensor, state: State, h: Any) -> tuple[Tensor, Tensor, State]:
    """The form of 2017: u = g + λx, while it is ‖g‖ that enters the ratio; momentum comes after the ratio."""
    return g + h.weight_decay * x, g, state


def descend(x: Tensor, u: Tensor, ratio: Tensor, state: State, h: Any) -> tuple[Tensor, State]:
    """x_{t+1} = x_t − η · ratio · u"""
    return x - h.lr * ratio * u, state


def descend_by_momentum(x: Tensor, u: Tensor, ratio: Tensor, state: State, h: Any) -> tuple[Tensor, State]:
    """Momentum after the ratio: b_t = μ b_{t−1} + ratio · u and x_{t+1} = x_t − η b_t."""
    scaled = ratio * u
    b = h.momentum * state["momentum_buffer"] + scaled
    step = scaled + h.momentum * b if h.nesterov else b
    return x - h.lr * step, {"momentum_buffer": b}


DIRECTION: dict[str, Callable[..., tuple[Tensor, Tensor, State]]] = {"lamb": lamb, "lars": lars, "lars2017": lars2017}
APPLY = {"lamb": descend, "lars": descend, "lars2017": descend_by_momentum}


class Reference:
    """The backend that moves one layer at a time by the functions above."""

    name = "reference"

    def refuses(self, rule: str, params: Sequence[Tensor]) -> str | None:
        return None

    def direction(self, rule: str, layers: Sequence[Layer], norm: str) -> tuple[Tensor, list[Tensor]]:
        updates, x_norms, u_norms = [], [], []
        for layer in layers:
            x, g, state = widen(layer)
            u, normalised, new_state = DIRECTION[rule](x, g, state, layer.hyper)
            store(layer, new_state)
            updates.append(u)
            x_norms.append(norms.partial(x, norm))
            u_norms.append(norms.partial(normalised, norm))
        return torch.stack([torch.stack(x_norms), torch.stack(u_norms)]), updates

    def apply(self, rule: str, layers: Sequence[Layer], ratio: Tensor, memory: list[Tensor]) -> None:
        for layer, u, r in zip(layers, memory, ratio.unbind(), strict=True):
            x, _, state = widen(layer)
            new_x, new_state = APPLY[rule](x, u, r, state, layer.hyper)
            layer.x.copy_(new_x)
            store(layer, new_state)


def widen(layer: Layer) -> tuple[Tensor, Tensor, State]:
    """Return x, the gradient to descend, and the state, in the dtype of the computation."""
    dtype = compute_dtype(layer.x)
    g = layer.g.to(dtype)
    state = {key: value.to(dtype) for key, value in layer.state.items() if key != "step"}
    return layer.x.to(dtype), -g if layer.hyper.maximize else g, state


def store(layer: Layer, state: State) -> None:
    """Write the new state into the old one's place."""
    for key, value in state.items():
        layer.state[key].copy_(value)


BACKEND = Reference()
