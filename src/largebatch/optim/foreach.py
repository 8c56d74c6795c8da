"""The backend in plain torch: lists of tiles through `torch._foreach_*`, with bounded temporaries.

The layers are cut into tiles, the tiles are gathered into buckets, and each bucket goes through a pass of the
mathematics at once: on the CPU while it is in cache, on an accelerator in a few launches for many layers. u is not kept
between the two passes. It is a function of x, g and the state, which stay as they are until `apply` moves x, so
`apply` forms it anew: more arithmetic, but no temporary of the size of the model. The rules are those of
`reference`, function for function.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import norms
from .backends import Backend, Layer, Layers
from .precision import compute_dtype, store, store_weights

Tensors = list[Tensor]

# Elements in a bucket, of which up to five float32 temporaries are alive. On the CPU they stay in the last cache: steps
# of BERT-mini took 376 ms at 2^16, 176 at 2^18, 135 at 2^20 and 128 at 2^22 (2 Zen 3 cores, torch 2.13, 2026-11-21).
CPU_BUCKET = 1 << 20
BUCKET = 1 << 25


class Bucket(NamedTuple):
    """Tiles of layers that share their numbers and dtypes, in parallel lists."""

    owners: list[int]  # the layer that each tile is of
    starts: list[int]  # where in the layer it starts
    x: Tensors
    g: Tensors
    state: dict[str, Tensors]
    hyper: Any


# ---- the rules ----


def lamb_state(x: Tensors, g: Tensors, state: dict[str, Tensors], h: Any) -> None:
    m, v = state["exp_avg"], state["exp_avg_sq"]
    torch._foreach_lerp_(m, g, 1 - h.beta1)  # m_t
    torch._foreach_mul_(v, h.beta2)
    torch._foreach_addcmul_(v, g, g, 1 - h.beta2)  # v_t


def lamb_direction(x: Tensors, g: Tensors, state: dict[str, Tensors], h: Any) -> tuple[Tensors, Tensors]:
    m, v = state["exp_avg"], state["exp_avg_sq"]
    if is_zero(h.g_scale) and is_zero(h.g_sq_scale) and not isinstance(h.v_scale, Tensor):
        # m̂ / (√v̂ + ε) in four passes in place of seven. Not for tensors: one that foreach adds is read on the host.
        denominator = list(torch._foreach_sqrt(v))
        torch._foreach_mul_(denominator, h.v_scale**0.5 / h.m_scale)
        torch._foreach_add_(denominator, h.eps / h.m_scale)
        u = list(torch._foreach_div(m, denominator))  # r_t
    else:
        denominator = scaled_copy(v, h.v_scale)
        add_scaled_(denominator, g, h.g_sq_scale, squared=True)  # v̂_t
        torch._foreach_sqrt_(denominator)
        torch._foreach_add_(denominator, h.eps)
        u = scaled_copy(m, h.m_scale)
        add_scaled_(u, g, h.g_scale)  # m̂_t
        torch._foreach_div_(u, denominator)  # r_t
    add_scaled_(u, x, h.weight_decay)  # r_t + λ x_t
    return u, u


def lars_state(x: Tensors, g: Tensors, state: dict[str, Tensors], h: Any) -> None:
    m = state["momentum_buffer"]
    torch._foreach_mul_(m, h.momentum)
    add_scaled_(m, g, 1 - h.momentum)
    add_scaled_(m, x, (1 - h.momentum) * h.weight_decay)  # m_t


def lars_direction(x: Tensors, g: Tensors, state: dict[str, Tensors], h: Any) -> tuple[Tensors, Tensors]:
    u = scaled_copy(state["momentum_buffer"], h.momentum if h.nesterov else 1.0)
    if h.nesterov:
        add_scaled_(u, g, 1 - h.momentum)
        add_scaled_(u, x, (1 - h.momentum) * h.weight_decay)
    return u, u


def lars2017_state(x: Tensors, g: Tensors, state: dict[str, Tensors], h: Any) -> None:
    """Leave it: the momentum waits for the ratio."""


def lars2017_direction(x: Tensors, g: Tensors, state: dict[str, Tensors], h: Any) -> tuple[Tensors, Tensors]:
    u = scaled_copy(g, 1.0)
    add_scaled_(u, x, h.weight_decay)
    return u, g


def descend(x: Tensors, u: Tensors, ratios: Tensors, state: dict[str, Tensors], h: Any) -> None:
    torch._foreach_mul_(u, ratios)
    add_scaled_(x, u, -h.rate)


def lamb_descend(x: Tensors, u: Tensors, ratios: Tensors, state: dict[str, Tensors], h: Any) -> None:
    if isinstance(h.keep, Tensor) or h.keep != 1:
        torch._foreach_mul_(x, h.keep)
    descend(x, u, ratios, state, h)


def lars2017_descend(x: Tensors, u: Tensors, ratios: Tensors, state: dict[str, Tensors], h: Any) -> None:
    b = state["momentum_buffer"]
    torch._foreach_mul_(u, ratios)
    torch._foreach_mul_(b, h.momentum)
    torch._foreach_add_(b, u)  # b_t
    if h.nesterov:
        add_scaled_(u, b, h.momentum)
    add_scaled_(x, u if h.nesterov else b, -h.rate)


class Rule(NamedTuple):
    """What a rule does to the tiles of a bucket: as `reference.Rule`, but x and the state change in place."""

    state: Callable[[Tensors, Tensors, dict[str, Tensors], Any], None]
    direction: Callable[[Tensors, Tensors, dict[str, Tensors], Any], tuple[Tensors, Tensors]]
    descend: Callable[[Tensors, Tensors, Tensors, dict[str, Tensors], Any], None]


RULES = {
    "lamb": Rule(lamb_state, lamb_direction, lamb_descend),
    "lars": Rule(lars_state, lars_direction, descend),
    "lars2017": Rule(lars2017_state, lars2017_direction, lars2017_descend),
}


class Foreach(Backend):
    """The backend that applies the functions above to one bucket after another."""

    name = "foreach"

    def direction(self, rule: str, layers: Layers, norm: str) -> tuple[Tensor, None]:
        owners: list[int] = []
        measured: list[Tensors] = [[], []]
        for bucket in buckets(layers):
            x, g, state = in_compute_dtype(bucket)
            g, marks = usable(g)
            RULES[rule].state(x, g, state, bucket.hyper)
            write(bucket, state, layers)
            _, normaliser = RULES[rule].direction(x, g, state, bucket.hyper)
            owners += bucket.owners
            measured[0] += norms.measure(x, norm)
            u_pieces = norms.measure(normaliser, norm)
            measured[1] += u_pieces if marks is None else torch._foreach_add(u_pieces, marks)
        return torch.stack([norms.join(pieces, owners, norm) for pieces in measured]), None

    def apply(self, rule: str, layers: Layers, ratio: Tensor, memory: None) -> None:
        of_layer = ratio.unbind()
        may_wait = on_host(ratio)
        if may_wait:
            moving = [i for i, moves in enumerate(ratio.isfinite().tolist()) if moves]
            layers, of_layer = Layers(layers[i] for i in moving), tuple(of_layer[i] for i in moving)
        for bucket in buckets(layers):
            x, g, state = in_compute_dtype(bucket)
            u, _ = RULES[rule].direction(x, g, state, bucket.hyper)
            ratios = [of_layer[owner] for owner in bucket.owners]
            moved = [x, *(state.values() if rule == "lars2017" else ())]  # in place, by descend
            old = [] if may_wait else [scaled_copy(tensors, 1.0) for tensors in moved]
            RULES[rule].descend(x, u, ratios, state, bucket.hyper)
            for tensors, were in zip(moved, old, strict=False):
                kept = [torch.where(r.isfinite(), a, b) for r, a, b in zip(ratios, tensors, were, strict=True)]
                torch._foreach_copy_(tensors, kept)
            if x is not bucket.x:
                store_weights(bucket.x, x)


BACKEND = Foreach()


# ---- tiles and buckets ----


def buckets(layers: Sequence[Layer]) -> Iterator[Bucket]:
    """Cut the layers into tiles and gather neighbours that share numbers and dtypes into buckets of bounded size."""
    if not layers:
        return
    size = CPU_BUCKET if layers[0].x.device.type == "cpu" else BUCKET
    if torch.compiler.is_compiling():
        size = 1 << 62  # the compiler does its own tiling
    bucket, kind, room = None, None, 0
    for owner, layer in enumerate(layers):
        keys = list(layer.state)
        start = 0
        for x, g, *state in tiles([layer.x, layer.g, *layer.state.values()], size):
            layer_kind = (id(layer.hyper), x.dtype, g.dtype, *(value.dtype for value in state))
            if bucket is None or layer_kind != kind or room < x.numel():
                if bucket is not None:
                    yield bucket
                bucket = Bucket([], [], [], [], {key: [] for key in keys}, layer.hyper)
                kind, room = layer_kind, size
            bucket.owners.append(owner)
            bucket.starts.append(start)
            bucket.x.append(x)
            bucket.g.append(g)
            for key, value in zip(keys, state, strict=True):
                bucket.state[key].append(value)
            start += x.numel()
            room -= x.numel()
    if bucket is not None:
        yield bucket


def tiles(tensors: Tensors, size: int) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of one shape into vectors of at most ``size`` elements, all in the order of the first one's memory.

    Tensors of no more stay as they are, and so do those that do not lie in memory in one order without holes, which
    cannot be viewed as vectors.
    """
    if tensors[0].numel() <= size:
        return iter([tuple(tensors)])
    order = sorted(range(tensors[0].dim()), key=tensors[0].stride, reverse=True)
    permuted = [a.permute(order) for a in tensors]
    for views in (tensors, permuted):
        if all(a.is_contiguous() for a in views):
            return zip(*(torch.split(a.view(-1), size) for a in views), strict=True)
    return iter([tuple(tensors)])


# ---- lists in the dtype of the mathematics ----


def on_host(a: Tensor) -> bool:
    """Say whether reading a value of this tensor waits for no device and breaks no graph."""
    return a.device.type == "cpu" and not torch.compiler.is_compiling()


def usable(g: Tensors) -> tuple[Tensors, Tensors | None]:
    """Return g with 0 where its square is not finite, and what to add to the norms of u: NaN for a tile with any such.

    On the host, where a look is all it takes as a rule, that is g itself and None. The look costs 4% of the step (14.2M
    parameters of BERT's shapes, one Zen 3 core, torch 2.13, 2026-11-21).
    """
    if on_host(g[0]) and all(math.isfinite(norm) for norm in torch._foreach_norm(g)):
        return g, None
    peaks = norms.measure(g, "linf")
    marks = torch._foreach_mul(peaks, peaks)
    torch._foreach_mul_(marks, 0.0)
    room = torch.cat([a.reshape(-1) for a in g])
    room = torch.where(room.square().isfinite(), room, 0.0)
    parts = torch.split(room, [a.numel() for a in g])
    return [part.view(a.shape) for part, a in zip(parts, g, strict=True)], list(marks)


def in_compute_dtype(bucket: Bucket) -> tuple[Tensors, Tensors, dict[str, Tensors]]:
    """Return x, the gradient to descend and the state: copies, where their own dtype is another."""
    dtype = compute_dtype(bucket.x[0])
    g = in_dtype(bucket.g, dtype)
    if bucket.hyper.maximize:
        g = list(torch._foreach_neg(g))
    return in_dtype(bucket.x, dtype), g, {key: in_dtype(values, dtype) for key, values in bucket.state.items()}


def in_dtype(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """Return the tensors themselves if they have this dtype, else copies that do."""
    return tensors if tensors[0].dtype is dtype else [a.to(dtype) for a in tensors]


def write(bucket: Bucket, state: dict[str, Tensors], layers: Sequence[Layer]) -> None:
    """Put the state back where it was copied from, rounded, and read what it became."""
    for which, (key, values) in enumerate(state.items()):
        targets = bucket.state[key]
        if values is targets:
            continue
        for target, value, owner, start in zip(targets, values, bucket.owners, bucket.starts, strict=True):
            store(target, value, layers[owner], which, start)
            value.copy_(target)


def is_zero(scale: float | Tensor) -> bool:
    return not isinstance(scale, Tensor) and scale == 0


def scaled_copy(tensors: Tensors, scale: float | Tensor) -> Tensors:
    """Return scale · tensors, a new list in one allocation."""
    sizes = [a.numel() for a in tensors]
    room = torch.empty(sum(sizes), dtype=tensors[0].dtype, device=tensors[0].device)
    copies = [part.view(a.shape) for part, a in zip(torch.split(room, sizes), tensors, strict=True)]
    torch._foreach_copy_(copies, tensors)
    if isinstance(scale, Tensor) or scale != 1:
        torch._foreach_mul_(copies, scale)
    return copies


def add_scaled_(tensors: Tensors, others: Tensors, scale: float | Tensor, squared: bool = False) -> None:
    """Add scale · others (or others²) to the tensors; nothing at all for a zero scale."""
    if isinstance(scale, Tensor):  # which foreach would read on the host to use as `alpha`
        others = scaled_copy(others, 1.0)
        torch._foreach_mul_(others, others if squared else scale)
        if squared:
            torch._foreach_mul_(others, scale)
        torch._foreach_add_(tensors, others)
    elif scale != 0:
        if squared:
            torch._foreach_addcmul_(tensors, others, others, scale)
        else:
            torch._foreach_add_(tensors, others, alpha=scale)
