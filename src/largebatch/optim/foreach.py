"""The backend in plain torch: lists of tiles through `torch._foreach_*`, with bounded temporaries.

A layer is cut into tiles, tiles are gathered into buckets, and a bucket goes through the whole of the mathematics
while it is in cache. u is never kept: it is a function of x, g and the state, none of which change between the two
passes, so `apply` forms it anew. That costs arithmetic and saves a buffer of the size of the model.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import norms
from .backends import Layer, compute_dtype

# Elements in a bucket, of which there are two temporaries.
BUCKET = {"cpu": 1 << 16}
LARGE_BUCKET = 1 << 25


class Bucket(NamedTuple):
    """Tiles of layers that share their numbers, in parallel lists."""

    owner: list[int]  # which layer each tile belongs to
    x: list[Tensor]
    g: list[Tensor]
    state: dict[str, list[Tensor]]
    hyper: Any


def buckets(layers: Sequence[Layer]) -> Iterator[Bucket]:
    """Cut the layers into tiles and gather them into buckets of bounded size."""
    size = BUCKET.get(layers[0].x.device.type, LARGE_BUCKET)
    if torch.compiler.is_compiling():
        size = 1 << 62  # the compiler does the tiling
    bucket: Bucket | None = None
    filled = 0
    previous: Layer | None = None
    for index, layer in enumerate(layers):
        state = {key: value for key, value in layer.state.items() if key != "step"}
        dtypes_change = previous is not None and (layer.x.dtype, layer.g.dtype) != (previous.x.dtype, previous.g.dtype)
        rows = zip(*(tile(a, size) for a in aligned([layer.x, layer.g, *state.values()])), strict=True)
        for x, g, *values in rows:
            if bucket is None or filled + x.numel() > size or bucket.hyper is not layer.hyper or dtypes_change:
                if bucket is not None:
                    yield bucket
                bucket = Bucket([], [], [], {key: [] for key in state}, layer.hyper)
                filled, dtypes_change = 0, False
            bucket.owner.append(index)
            bucket.x.append(x)
            bucket.g.append(g)
            for key, value in zip(state, values, strict=True):
                bucket.state[key].append(value)
            filled += x.numel()
        previous = layer
    if bucket is not None:
        yield bucket


def aligned(tensors: list[Tensor]) -> list[Tensor]:
    """Return the tensors as vectors where all lie in memory in the same order without holes, else as they are."""
    x = tensors[0]
    if all(a.is_contiguous() for a in tensors):
        return [a.view(-1) for a in tensors]
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    permuted = [a.permute(order) for a in tensors]
    if all(a.is_contiguous() for a in permuted):
        return [a.view(-1) for a in permuted]
    return tensors


def tile(a: Tensor, size: int) -> Sequence[Tensor]:
    return a.split(size) if a.dim() == 1 else [a]


def scratch(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Make room for one temporary shaped like each of ``tensors``, in one allocation."""
    flat = torch.empty(sum(a.numel() for a in tensors), dtype=dtype, device=tensors[0].device)
    return [part.view(a.shape) for part, a in zip(flat.split([a.numel() for a in tensors]), tensors, strict=True)]


def gradient(bucket: Bucket) -> list[Tensor]:
    """Return the gradient to descend, in the dtype of the computation."""
    dtype = compute_dtype(bucket.x[0])
    if not bucket.hyper.maximize and bucket.g[0].dtype == dtype:
        return bucket.g
    g = scratch(bucket.g, dtype)
    torch._foreach_copy_(g, bucket.g)
    if bucket.hyper.maximize:
        torch._foreach_neg_(g)
    return g


def lamb_moments(g: list[Tensor], state: dict[str, list[Tensor]], h: Any) -> None:
    m, v = state["exp_avg"], state["exp_avg_sq"]
    torch._foreach_lerp_(m, g, 1 - h.beta1)  # m_t
    torch._foreach_mul_(v, h.beta2)
    torch._foreach_addcmul_(v, g, g, 1 - h.beta2)  # v_t


def lamb_direction(x: list[Tensor], g: list[Tensor], state: dict[str, list[Tensor]], h: Any) -> list[Tensor]:
    u, denominator = scratch(x, g[0].dtype), scratch(x, g[0].dtype)
    torch._foreach_copy_(denominator, state["exp_avg_sq"])
    torch._foreach_mul_(denominator, h.v_scale)
    torch._foreach_sqrt_(denominator)
    torch._foreach_add_(denominator, h.eps)  # √v̂ + ε
    torch._foreach_copy_(u, state["exp_avg"])
    torch._foreach_mul_(u, h.m_scale)  # m̂
    torch._foreach_div_(u, denominator)  # r_t
    torch._foreach_add_(u, x, alpha=h.weight_decay)
    return u


def lars_momentum(x: list[Tensor], g: list[Tensor], state: dict[str, list[Tensor]], h: Any) -> None:
    m = state["momentum_buffer"]
    torch._foreach_mul_(m, h.momentum)
    torch._foreach_add_(m, g, alpha=1 - h.momentum)
    torch._foreach_add_(m, x, alpha=(1 - h.momentum) * h.weight_decay)  # m_t


def lars_direction(x: list[Tensor], g: list[Tensor], state: dict[str, list[Tensor]], h: Any) -> list[Tensor]:
    u = scratch(x, g[0].dtype)
    torch._foreach_copy_(u, state["momentum_buffer"])
    if h.nesterov:
        torch._foreach_mul_(u, h.momentum)
        torch._foreach_add_(u, g, alpha=1 - h.momentum)
        torch._foreach_add_(u, x, alpha=(1 - h.momentum) * h.weight_decay)
    return u


def lars2017_direction(x: list[Tensor], g: list[Tensor], h: Any) -> list[Tensor]:
    u = scratch(x, g[0].dtype)
    torch._foreach_copy_(u, g)
    torch._foreach_add_(u, x, alpha=h.weight_decay)
    return u


class Foreach:
    """The backend of tiles and `torch._foreach_*`."""

    name = "foreach"

    def refuses(self, rule: str, params: Sequence[Tensor]) -> str | None:
        return None

    def direction(self, rule: str, layers: Sequence[Layer], norm: str) -> tuple[Tensor, None]:
        x_pieces: list[list[Tensor]] = [[] for _ in layers]
        u_pieces: list[list[Tensor]] = [[] for _ in layers]
        for bucket in buckets(layers):
            g = gradient(bucket)
            if rule == "lamb":
                lamb_moments(g, bucket.state, bucket.hyper)
                u = lamb_direction(bucket.x, g, bucket.state, bucket.hyper)
            elif rule == "lars":
                lars_momentum(bucket.x, g, bucket.state, bucket.hyper)
                u = lars_direction(bucket.x, g, bucket.state, bucket.hyper)
            else:
                u = g
            for owner, x_tile, u_tile in zip(bucket.owner, bucket.x, u, strict=True):
                x_pieces[owner].append(norms.partial(x_tile, norm))
                u_pieces[owner].append(norms.partial(u_tile, norm))
        return torch.stack([total(x_pieces, norm), total(u_pieces, norm)]), None

    def apply(self, rule: str, layers: Sequence[Layer], ratio: Tensor, memory: None) -> None:
        ratios = ratio.to(compute_dtype(layers[0].x)).unbind()
        for bucket in buckets(layers):
            g, h = gradient(bucket), bucket.hyper
            # A tensor as `alpha` would be read by the host, so a tensor learning rate goes through the ratio.
            mine = [ratios[owner] for owner in bucket.owner]
            rate = 1.0 if isinstance(h.lr, Tensor) else h.lr
            if isinstance(h.lr, Tensor) and rule != "lars2017":
                mine = [r * h.lr.to(r.dtype) for r in mine]
            if rule == "lars2017":
                b = bucket.state["momentum_buffer"]
                u = lars2017_direction(bucket.x, g, h)
                torch._foreach_mul_(u, mine)
                torch._foreach_mul_(b, h.momentum)
                torch._foreach_add_(b, u)
                if h.nesterov:
                    torch._foreach_add_(u, b, alpha=h.momentum)
                else:
                    u = b
                if isinstance(h.lr, Tensor):
                    u = list(torch._foreach_mul(u, h.lr.to(u[0].dtype)))
                torch._foreach_add_(bucket.x, u, alpha=-rate)
                continue
            if rule == "lamb":
                u = lamb_direction(bucket.x, g, bucket.state, h)
            else:
                u = lars_direction(bucket.x, g, bucket.state, h)
            torch._foreach_mul_(u, mine)
            torch._foreach_add_(bucket.x, u, alpha=-rate)


def total(pieces: list[list[Tensor]], norm: str) -> Tensor:
    """Sum (or take the maximum of) each layer's pieces."""
    joined = [torch.stack(own) for own in pieces]
    return torch.stack([own.amax() if norm == "linf" else own.sum() for own in joined])


BACKEND = Foreach()
