"""Layer norms and trust ratios: the only file of the optimizers that may know of shards.

A norm is taken in two halves, so that a layer that is cut into shards has the norm of the whole layer:

1. `measure` and `join` reduce what this process holds of a layer to one number (l2: a sum of squares; l1: a sum of
   magnitudes; linf: a maximum);
2. `combine` reduces those numbers over the processes that hold the rest, and finishes (l2: the square root).

A process that holds every layer whole is the degenerate case, in which the second half communicates nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Phi = None | tuple[float, float] | Callable[[Tensor], Tensor]

ORDERS = {"l2": 2.0, "l1": 1.0, "linf": float("inf")}

# torch's CPU norm of one long vector keeps so few accumulators that a 30522 x 1024 tensor comes out 2e-3 too small.
# The norms of short rows, squared and summed in float64, agree with float64 to 1e-9 and cost no more (9.4 ms against
# 8.7 ms for that tensor; float64 throughout costs 250 ms. One Zen 3 core, torch 2.13, 2026-11-21).
ROW = 1024


def measure(tiles: Sequence[Tensor], norm: str) -> list[Tensor]:
    """Return the norms of disjoint pieces of each tile, a vector per tile.

    They accumulate in float32 or better whatever the dtype of the tile, so that no half-precision norm overflows or
    stalls. What the squares still cannot hold are float32 magnitudes above 1e19 or below 1e-19.
    """
    order = ORDERS[norm]
    dtype = torch.promote_types(tiles[0].dtype, torch.float32)
    if tiles[0].device.type != "cpu":  # accumulates in a tree, and one launch serves many tiles
        filled = [tile if tile.numel() else tile.new_zeros(1) for tile in tiles]
        return [total.view(1) for total in torch._foreach_norm(filled, order, dtype)]
    pieces = []
    for tile in tiles:
        vector = tile.reshape(-1)
        whole = vector.numel() // ROW * ROW
        rows = torch.linalg.vector_norm(vector[:whole].view(-1, ROW), order, dim=1, dtype=dtype)
        if whole < vector.numel():
            rest = torch.linalg.vector_norm(vector[whole:], order, dtype=dtype)
            rows = torch.cat([rows, rest.view(1)])
        pieces.append(rows)
    return pieces


def join(pieces: Sequence[Tensor], owners: Sequence[int], norm: str) -> Tensor:
    """Join the norms of pieces into what `combine` takes, [L]: one number for each layer of this process.

    Args:
        pieces: vectors, as `measure` returns them.
        owners: the layer that each vector is of: ascending, every layer present.
        norm: "l2", "l1" or "linf".
    """
    device = pieces[0].device
    values = torch.cat(list(pieces)).to(total_dtype(device))
    if norm == "l2":
        values = values.square()
    counts = [0] * (owners[-1] + 1)
    for owner, piece in zip(owners, pieces, strict=True):
        counts[owner] += piece.numel()
    if all(count == 1 for count in counts):
        return values
    of_layers = torch.split(values, counts)
    if norm == "linf":
        return torch.stack([own.amax() if own.numel() else own.sum() for own in of_layers])
    return torch.stack([own.sum() for own in of_layers])


def total_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of what is reckoned once per layer: float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def combine(local: Tensor, layers: Sequence[Tensor], norm: str) -> Tensor:
    """Turn what this process holds of the norms, [k, L], into the norms of the whole ``layers``, [k, L].

    This is where sharded layers meet: all k·L numbers are one tensor so that it takes at most one all-reduce for each
    process group over which any of the layers is cut. Layers that are held whole need none.
    """
    return local.sqrt() if norm == "l2" else local


def is_sharded(x: Tensor) -> bool:
    """Say whether ``x`` is one process's part of a distributed tensor."""
    return hasattr(x, "placements")  # DTensor, whose import would cost every user of one process half a second


def phi_of(phi: Phi, x_norm: Tensor) -> Tensor:
    """Apply φ to the norms of the weights: the identity, the paper's clip to [low, high], or the user's own."""
    if phi is None:
        return x_norm
    if callable(phi):
        return phi(x_norm)
    low, high = phi
    return x_norm.clamp(low, high)


def trust_ratios(
    x_norms: Tensor,
    u_norms: Tensor,
    groups: Sequence[dict[str, Any]],
    ratio: Callable[[Tensor, Tensor, dict[str, Any]], Tensor],
) -> Tensor:
    """Return what multiplies each layer's learning rate, [L], from the norms of the layers, [L] each.

    Args:
        x_norms: ‖x‖.
        u_norms: ‖u‖.
        groups: each layer's parameter group. Neighbours of one group share its φ and are reckoned together.
        ratio: what to do with the norms of a group that adapts.
    """
    ratios, start = [], 0
    while start < len(groups):
        group, stop = groups[start], start
        while stop < len(groups) and groups[stop] is group:
            stop += 1
        x_norm, u_norm = x_norms[start:stop], u_norms[start:stop]
        ratios.append(ratio(x_norm, u_norm, group) if group["adapt"] else torch.ones_like(x_norm))
        start = stop
    return torch.cat(ratios)


def trust_ratio(x_norm: Tensor, u_norm: Tensor, phi: Phi) -> Tensor:
    """Return φ(‖x‖)/‖u‖, and 1 where either norm is zero, so that a layer of zeros takes the plain step."""
    return torch.where((x_norm == 0) | (u_norm == 0), 1.0, phi_of(phi, x_norm) / u_norm)
