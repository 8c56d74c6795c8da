"""Layer norms and trust ratios: the only file of the optimizers that knows of shards.

A norm is taken in two halves, so that a layer that is cut into shards has the norm of the whole layer:

1. `measure` and `join` reduce what this process holds of a layer to one number (l2: a sum of squares; l1: a sum of
   magnitudes; linf: a maximum);
2. `combine` reduces those numbers over the processes that hold the rest, and finishes (l2: the square root).

A process that holds every layer whole is the degenerate case, in which the second half communicates nothing.

What a process holds of a layer is a `Part`: all of it, its shard of a DTensor (FSDP2, tensor parallelism, any mesh of
them), or its segment of a flat tensor that several layers share (`flat_partition`).
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_dense
from .precision import WHOLE, Origin

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


def combine(local: Tensor, cuts: Sequence["Cut"], norm: str) -> Tensor:
    """Turn what this process holds of the norms, [k, L], into the norms of the whole layers, [k, L].

    This is where sharded layers meet. The numbers of all layers travel together, so that there is one all-reduce for
    each process group over which any of them is cut, and none if there is no such group.

    Args:
        local: as `join` makes it, or several of them stacked.
        cuts: over which processes each layer is cut. All of those processes must pass the same layers in one order.
        norm: "l2", "l1" or "linf".
    """
    for group, device_type in dict.fromkeys(over for cut in cuts for over in cut):
        columns = list(local.unbind(-1))
        meeting = [i for i, cut in enumerate(cuts) if (group, device_type) in cut]
        numbers = torch.stack([columns[i] for i in meeting]).to(device_type)  # elsewhere only if FSDP2 offloads to CPU
        if norm == "linf":  # a maximum over processes may lose a NaN
            all_reduce(numbers.nan_to_num_(torch.inf, torch.inf), "max", group)
        else:
            all_reduce(numbers, "sum", group)
        for i, whole in zip(meeting, numbers.to(local.device), strict=True):
            columns[i] = whole
        local = torch.stack(columns, -1)
    return local.sqrt() if norm == "l2" else local


def all_reduce(tensor: Tensor, operation: str, group: Any) -> None:
    """Reduce ``tensor``, in place, over the processes of a group."""
    from torch import distributed

    distributed.all_reduce(tensor, getattr(distributed.ReduceOp, operation.upper()), group)


def global_norm(params: Sequence[Tensor]) -> Tensor:
    """Return the l2 norm over the gradients of all ``params``, each cut as its parameter is: a 0-D tensor.

    One all-reduce for each process group over which any of them is cut.
    """
    check_dense(x.grad for x in params)
    held = [local(x.grad) for x in params]
    return norm_from_squares(join(measure(held, "l2"), range(len(held)), "l2"), params)


def norm_from_squares(squares: Tensor, params: Sequence[Tensor]) -> Tensor:
    """Return what `global_norm` does, from what `square` said of each of ``params``."""
    return combine(squares, [cut_of(x, i) for i, x in enumerate(params)], "l2").square().sum().sqrt()


def square(x: Tensor) -> Tensor:
    """Return the sum of squares, [1], of what this process holds of the gradient of ``x``."""
    check_dense([x.grad])
    return join(measure([local(x.grad)], "l2"), [0], "l2")


# ---- what this process holds of a layer ----

# The process groups over which a layer is cut, each with the type of device that its messages are on.
Cut = tuple[tuple[Any, str], ...]


class Part(NamedTuple):
    """What this process holds of one layer."""

    name: str | int
    position: int  # among all layers of the optimizer
    cut: Cut = ()
    segment: slice | None = None  # of a flat tensor
    origin: Origin = WHOLE

    def of(self, tensor: Tensor) -> Tensor:
        """Return this part of a tensor that is cut like the parameter: a view."""
        held = local(tensor)
        return held if self.segment is None else held[self.segment]


class FlatPartition(NamedTuple):
    """What a flat tensor holds: a stretch, from ``start``, of the concatenation of all ``layers``."""

    layers: Mapping[str, int]
    start: int
    cut: Cut


def flat_partition(tensor: Tensor, layers: Mapping[str, int], start: int, group: Any = None) -> Tensor:
    """Tell the optimizers which layers a flat tensor holds segments of, as ZeRO's partitions do.

    The trust ratios are then those of the layers, as if each were a tensor of its own, and one all-reduce over the
    group finds them all. Elements behind the last layer are padding, and part of no layer.

    Args:
        tensor: 1-D, this process's stretch of the concatenation of all layers. It takes one parameter group's settings.
        layers: the number of elements of every layer, by name, in the order of the concatenation; the same on all
            processes, whatever they hold of it. The names are the keys of `trust_ratios()`.
        start: where in the concatenation ``tensor`` begins.
        group: the processes that hold the other stretches; None is all of them.

    Returns:
        ``tensor``, marked: pass this very object to the optimizer.

    Raises:
        ValueError: the tensor is not flat, or a size or the start is negative.

    Example:
        >>> import torch
        >>> from largebatch import LAMB
        >>> from largebatch.optim import flat_partition
        >>> flat = torch.nn.Parameter(torch.ones(10))  # on one process, which needs no group
        >>> optimizer = LAMB([flat_partition(flat, {"weight": 6, "bias": 4}, start=0)])
        >>> flat.grad = torch.ones(10)
        >>> optimizer.step()
        >>> sorted(optimizer.trust_ratios())
        ['bias', 'weight']
    """
    from torch import distributed

    if tensor.dim() != 1 or is_sharded(tensor):
        raise ValueError(f"tensor of shape {list(tensor.shape)}: expected a plain tensor of one dimension")
    if start < 0 or any(size < 0 for size in layers.values()):
        raise ValueError(f"start={start}, layers={dict(layers)}: expected no negative number")
    many = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size(group) > 1
    cut: Cut = ((group or distributed.group.WORLD, tensor.device.type),) if many else ()
    tensor._flat_partition = FlatPartition(dict(layers), start, cut)  # type: ignore[attr-defined]
    return tensor


def is_sharded(x: Tensor) -> bool:
    """Say whether ``x`` is one process's part of a distributed tensor."""
    return hasattr(x, "placements")  # DTensor, whose import would cost every user of one process half a second


def parts(x: Tensor, name: str | int | None, position: int, with_origin: bool = False) -> list[Part]:
    """Say what this process holds of the layers of a parameter: one layer, but for flat partitions.

    Args:
        x: the parameter.
        name: its name; None if it has none but its position.
        position: how many layers come before it.
        with_origin: whether to find out the origin of a shard, which takes some time.

    Raises:
        ValueError: it cannot be told which elements of which layer the parameter holds.
    """
    name = position if name is None else name
    if is_sharded(x):
        return [Part(name, position, cut_of(x, name), origin=origin_of(x) if with_origin else WHOLE)]
    if getattr(x, "_fsdp_flattened", False):  # torch's mark on the parameters of FSDP1, use_orig_params or not
        raise ValueError(
            f"parameter {name!r} is wrapped by FullyShardedDataParallel (FSDP1), which cuts layers apart and leaves no "
            "record of where; use torch.distributed.fsdp.fully_shard (FSDP2) instead"
        )
    flat: FlatPartition | None = getattr(x, "_flat_partition", None)
    if flat is None:
        return [Part(name, position)]
    found: list[Part] = []
    offset = -flat.start
    for layer, size in flat.layers.items():  # those held elsewhere too: all processes have the same list
        held = slice(*(min(max(bound, 0), x.numel()) for bound in (offset, offset + size)))
        found.append(Part(layer, position + len(found), flat.cut, held, Origin(max(-offset, 0))))
        offset += size
    return found


def cut_of(x: Any, name: str | int) -> Cut:
    """Return the process groups over which a tensor is cut: of a DTensor, the dimensions of its mesh that shard it."""
    if not is_sharded(x):
        return ()
    cut = []
    for dim, placement in enumerate(x.placements):
        if placement.is_partial():
            raise ValueError(
                f"parameter {name!r} is placed as {x.placements}, a sum that no process holds: redistribute it first"
            )
        if not placement.is_replicate() and x.device_mesh.size(dim) > 1:
            cut.append((x.device_mesh.get_group(dim), x.device_mesh.device_type))
    return tuple(cut)


def local(x: Any) -> Tensor:
    """Return what this process holds of a tensor, in the same memory: the tensor itself, or a DTensor's shard."""
    if not is_sharded(x):
        return x  # type: ignore[no-any-return]
    shard: Any = x.to_local()
    return shard.wait() if hasattr(shard, "wait") else shard  # type: ignore[no-any-return]


def on_cpu(x: Any) -> Tensor:
    """Return an uninitialised tensor on the CPU, cut as ``x`` is; pinned, if x is elsewhere."""
    held = local(x).detach()
    copy = torch.empty_like(held, device="cpu", pin_memory=held.device.type != "cpu")
    if is_sharded(x):  # not from_local, which would move it to the device of the mesh
        copy = type(x)(copy, x._spec, requires_grad=False)
    if hasattr(x, "_flat_partition"):
        copy._flat_partition = x._flat_partition  # type: ignore[attr-defined]
    return copy


def has_replicas(x: Tensor) -> bool:
    """Say whether other processes hold the same parameter, whose gradient is the sum of theirs and this one's."""
    from torch import distributed

    many = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    return many and not is_sharded(x)


def gradients(params: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of ``params``, which all have one, each cut as its parameter is.

    Tensor parallelism leaves some as sums that are still to be taken over a dimension of the mesh (of the layer norms
    under `SequenceParallel`, for one). Those travel together, one all-reduce for each process group.
    """
    found: list[Any] = [x.grad for x in params]
    pending: dict[Any, list[int]] = {}
    x: Any
    for i, (x, g) in enumerate(zip(params, found, strict=True)):
        if is_sharded(x) and g.placements != x.placements:
            differ = [dim for dim, of_x in enumerate(x.placements) if g.placements[dim] != of_x]
            first = differ[0]
            if len(differ) == 1 and g.placements[first].is_partial("sum") and x.placements[first].is_replicate():
                pending.setdefault((g.device_mesh.get_group(first), g.dtype, g.device), []).append(i)
            else:
                found[i] = g.redistribute(placements=x.placements)
    for (group, *_), waiting in pending.items():
        summands = [local(found[i]) for i in waiting]
        together = torch.cat([summand.reshape(-1) for summand in summands])
        all_reduce(together, "sum", group)
        for i, summand, total in zip(waiting, summands, together.split([a.numel() for a in summands]), strict=True):  # type: ignore[no-untyped-call]
            x, whole = params[i], total.view(summand.shape)
            found[i] = type(x).from_local(whole, x.device_mesh, x.placements, shape=x.shape, stride=x.stride())
    return found


def origin_of(x: Any) -> Origin:
    """Say where the elements of a DTensor's shard lie in the layer."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
    start = sum(first * math.prod(x.shape[dim + 1 :]) for dim, first in enumerate(offset))
    narrowed = [dim for dim in range(1, x.dim()) if shape[dim] != x.shape[dim]]
    if not narrowed:  # rows, which lie together
        return Origin(start)
    run = math.prod(shape[narrowed[-1] :])
    return Origin(start, max(run, 1), math.prod(x.shape[narrowed[-1] :]) - run)


def phi_of(phi: Phi, x_norm: Tensor) -> Tensor:
    """Apply φ to the norms of the weights: the identity, the paper's clip to [low, high], or the user's own."""
    if phi is None:
        return x_norm
    if callable(phi):
        return phi(x_norm)
    low, high = phi
    return x_norm.clamp(low, high)


class Ratio(NamedTuple):
    """How a group's layers get their factor of the learning rate from ‖x‖ and ‖u‖.

    bounds(coefficient · φ(z) / (‖u‖ + eps + decay · z)), where z = shrink · ‖x‖; and 1 where z or ‖u‖ is zero.
    """

    phi: Phi = None
    shrink: float | Tensor = 1.0
    eps: float = 0.0
    decay: float = 0.0
    coefficient: float = 1.0
    bounds: tuple[float, float] | None = None


def trust_ratio(x_norm: Tensor, u_norm: Tensor, ratio: Ratio) -> Tensor:
    """Return the factors of layers that share ``ratio``, from the vectors of their norms."""
    z = x_norm * ratio.shrink
    is_zero = (z == 0) | (u_norm == 0)  # before φ, which may write to what it is handed
    divisor = u_norm + ratio.eps
    if ratio.decay != 0:
        divisor = divisor + ratio.decay * z
    factor = ratio.coefficient * phi_of(ratio.phi, z) / divisor
    if ratio.bounds is not None:
        factor = factor.clamp(*ratio.bounds)
    return torch.where(is_zero, 1.0, factor)


def by_name(ratios: Iterable[tuple[str | int, Tensor]]) -> dict[str | int, Tensor]:
    """Return trust ratios by their layers' names; those of one name, as of two models, are "w", "w#2" and so on."""
    named: dict[str | int, Tensor] = {}
    for name, ratio in ratios:
        key, number = name, 1
        while key in named:
            number += 1
            key = f"{name}#{number}"
        named[key] = ratio
    return named


def trust_ratios(x_norms: Tensor, u_norms: Tensor, ratios: Sequence[Ratio | None]) -> Tensor:
    """Return what multiplies each layer's learning rate, [L], from the norms of the layers, [L] each.

    NaN stands for a layer that has to stay where it is: its ‖u‖ or its ratio is not finite.

    Args:
        x_norms: ‖x‖.
        u_norms: ‖u‖.
        ratios: what to make of them, None for layers that do not adapt. Neighbours that share the object are reckoned
            together, so that a callable φ gets a vector.
    """
    factors, start = [], 0
    while start < len(ratios):
        ratio, stop = ratios[start], start
        while stop < len(ratios) and ratios[stop] is ratio:
            stop += 1
        x_norm, u_norm = x_norms[start:stop], u_norms[start:stop]
        factors.append(torch.ones_like(x_norm) if ratio is None else trust_ratio(x_norm, u_norm, ratio))
        start = stop
    together = torch.cat(factors)
    return torch.where(u_norms.isfinite() & together.isfinite(), together, torch.nan)
