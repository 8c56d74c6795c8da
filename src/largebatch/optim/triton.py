"""The CUDA backend: a step of all layers of the same dtypes is three launches or one, and no norm is a pass of its own.

The first advances the state, forms u, and leaves each chunk's share of the two norms. The second joins the shares in a
fixed order, so that runs repeat to the bit, and makes the trust ratios of them. The third forms u again from what the
first left behind, last chunk first, since that is what is still in cache. In float32 the first reads x, g, m, v and
writes m, v; the third reads x, m, v and writes x: 40 bytes a parameter. N-LAMB, NN-LAMB and Nesterov momentum read g
twice.

`Triton.one_launch` has the same programs do both passes over a layer one after the other, so that of a layer that fits
the level-2 cache the second reads no memory: 28 bytes. It has not run on a GPU yet, hence it is off.

Nothing waits for the device. The kernels find the tensors by a table on the device, which is sent anew only when one of
them has moved, and learning rates and step counts that are tensors stay there: a CUDA graph can hold the step.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from . import triton_kernels as kernels
from .backends import Backend, Layer, Layers, Scaling
from .checks import check_shape
from .norms import total_dtype
from .precision import compute_dtype

CHUNK = 1 << 14  # elements of a program
BLOCK = 1 << 11  # of which it has this many in registers at a time
SHARES = 1 << 10  # that are joined at a time
WARPS = 8

# Of the one launch: what all programs work on at a time leaves room in the level-2 cache for what they go back to.
SMALL_CHUNK = 1 << 12
SMALL_BLOCK = 1 << 10
PROGRAMS_EACH = 2  # on a multiprocessor

TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(eq=False)
class Part:
    """The layers of a step that have the same dtypes, and what the kernels are told about them."""

    owners: list[int]
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]  # of x, g and the state
    rounded: torch.dtype | None  # what a master copy is rounded to
    rows: list[list[int]] = field(default_factory=list)  # as on the device
    num_chunks: list[int] = field(default_factory=list)  # of each layer, as on the device
    of_graph: bool = False  # sent while a CUDA graph was captured, so not there before its first replay
    aligned: bool = False  # every tensor begins at a multiple of 16 bytes
    table: Tensor = field(init=False)  # [layers, WIDTH] int64
    chunks: Tensor = field(init=False)  # [chunks] int32: the layer of each
    tasks: Tensor | None = None  # [2 * chunks] int32, for the one launch: see `triton_kernels.whole`
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # of tensors that kernels cannot walk through
    grads: list[Tensor] = field(default_factory=list)  # copies, too, which nothing else would keep alive


class Triton(Backend):
    """The backend whose kernels are in `triton_kernels`."""

    name = "triton"
    compiles = False
    takes_scaling = True

    def __init__(self) -> None:
        self.one_launch = False  # where no process holds a part of a layer, and phi is no callable
        self._captured: list[Any] = []  # what CUDA graphs read for as long as they are replayed

    def refuses(self, rule: str, params: Sequence[Tensor]) -> str | None:
        for x in params:
            if x.dtype not in TYPES:
                return f"it does not take {x.dtype}"
            if x.device.type != "cuda" and not interpreted():
                return f"it needs parameters on a CUDA device, and one is on {x.device}"
        return None

    def step(self, rule: str, layers: Layers, norm: str) -> Tensor | None:
        if any(layer.ratio is not None and callable(layer.ratio.phi) for layer in layers):
            return None
        with current_device_of(layers):
            if self.one_launch:
                return self._whole(rule, layers, norm)
            _, ratios, parts = self._direct(rule, layers, norm)
            self._descend(rule, layers, ratios, parts)
        return ratios

    def direction(self, rule: str, layers: Layers, norm: str) -> tuple[Tensor, Any]:
        with current_device_of(layers):
            totals, _, parts = self._direct(rule, layers, norm)
        return totals, parts

    def apply(self, rule: str, layers: Layers, ratio: Tensor, memory: Any) -> None:
        with current_device_of(layers):
            self._descend(rule, layers, ratio.contiguous(), memory)

    def _direct(self, rule: str, layers: Layers, norm: str) -> tuple[Tensor, Tensor, list[tuple[Part, Tensor]]]:
        device = layers[0].x.device
        totals = torch.empty(2, len(layers), dtype=total_dtype(device), device=device)
        ratios = torch.empty(len(layers), dtype=totals.dtype, device=device)
        parts = []
        for part in self._parts(layers):
            hypers = self._enter(part, layers, CHUNK, False)
            shares = torch.empty(2, len(part.chunks), dtype=compute_dtype(layers[part.owners[0]].x), device=device)
            if len(part.chunks):
                kernels.direct[(len(part.chunks),)](
                    part.table, part.chunks, hypers, shares, len(part.chunks), rule=rule, norm=norm, size=CHUNK,
                    block=BLOCK, num_warps=WARPS, **types(part),
                )  # fmt: skip
            kernels.settle[(len(part.owners),)](
                part.table, hypers, shares, len(part.chunks), totals, ratios, len(layers), norm=norm, size=CHUNK,
                block=SHARES, dtype=TYPES[totals.dtype],
            )  # fmt: skip
            parts.append((part, hypers))
        return totals, ratios, parts

    def _descend(self, rule: str, layers: Layers, ratios: Tensor, parts: list[tuple[Part, Tensor]]) -> None:
        for part, hypers in parts:
            if len(part.chunks):
                kernels.descend[(len(part.chunks),)](
                    part.table, part.chunks, hypers, ratios, len(part.chunks), rule=rule, size=CHUNK, block=BLOCK,
                    num_warps=WARPS, **types(part), **second_pass(rule, part, layers),
                )  # fmt: skip
            finish(part)
        touch(layers)

    def _whole(self, rule: str, layers: Layers, norm: str) -> Tensor:
        """Take the whole step of all layers in one launch for each choice of dtypes."""
        device = layers[0].x.device
        totals = torch.empty(2, len(layers), dtype=total_dtype(device), device=device)
        ratios = torch.ones(len(layers), dtype=totals.dtype, device=device)
        for part in self._parts(layers):
            hypers = self._enter(part, layers, SMALL_CHUNK, True)
            assert part.tasks is not None
            if len(part.chunks):
                shares = torch.empty(2, len(part.chunks), dtype=compute_dtype(layers[part.owners[0]].x), device=device)
                counters = torch.zeros(1 + len(part.owners), dtype=torch.int32, device=device)
                kernels.whole[(num_programs(device),)](
                    part.table, part.chunks, part.tasks, hypers, shares, totals, ratios, counters,
                    len(part.chunks), len(layers), len(part.tasks), rule=rule, norm=norm,
                    total_type=TYPES[totals.dtype], size=SMALL_CHUNK, block=SMALL_BLOCK, shares_block=SHARES,
                    num_warps=WARPS, **types(part), **second_pass(rule, part, layers),
                )  # fmt: skip
            finish(part)
        touch(layers)
        return ratios

    # ---- what the kernels are told ----

    def _parts(self, layers: Layers) -> list[Part]:
        """Sort the layers by dtypes, and find what was made of them at the last step."""
        owners: dict[Any, list[int]] = {}
        for owner, layer in enumerate(layers):
            dtypes = layer.x.dtype, layer.g.dtype, next(iter(layer.state.values())).dtype
            rounded = None if layer.rounded is None else layer.rounded.dtype
            owners.setdefault((dtypes, rounded), []).append(owner)
        known: list[Part] = layers.memo or []
        if [((part.dtypes, part.rounded), part.owners) for part in known] != list(owners.items()):
            known = layers.memo = [Part(own, *kind) for kind, own in owners.items()]
        return known

    def _enter(self, part: Part, layers: Layers, size: int, one_launch: bool) -> Tensor:
        """Bring the tables of these layers up to date, for chunks of this size, and return their numbers."""
        part.copies, part.grads = [], []
        own = [layers[owner] for owner in part.owners]
        numbered: dict[tuple[int, int], int] = {}
        rows, first_chunk, num_chunks = [], 0, []
        for owner, layer in zip(part.owners, own, strict=True):
            x, rounded, g, *state = aligned(layer, part.copies)
            part.grads.append(g)
            number = numbered.setdefault((id(layer.hyper), id(layer.ratio)), len(numbered))
            addresses = [a.data_ptr() for a in (x, rounded, g, *state, *state)][:5]
            # In the order of the columns in triton_kernels.py.
            rows.append([*addresses, x.numel(), first_chunk, layer.position, *layer.origin, number, owner])
            num_chunks.append(-(-x.numel() // size))
            first_chunk += num_chunks[-1]
        device = own[0].x.device
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if part.of_graph and not capturing:
            part.rows, part.num_chunks, part.tasks, part.of_graph = [], [], None, False
        if num_chunks != part.num_chunks:  # seldom; addresses change wherever gradients are made anew
            chunks = [i for i, number in enumerate(num_chunks) for _ in range(number)]
            part.chunks = self._send(torch.tensor(chunks, dtype=torch.int32, device="cpu"), device)
            part.num_chunks, part.tasks, part.of_graph = num_chunks, None, capturing
        if one_launch and part.tasks is None:
            order = tasks(num_chunks, num_programs(device))
            part.tasks, part.of_graph = (
                self._send(torch.tensor(order, dtype=torch.int32, device="cpu"), device),
                capturing,
            )
        if rows != part.rows:
            part.table = self._send(torch.tensor(rows, dtype=torch.int64, device="cpu"), device)
            part.rows, part.of_graph = rows, capturing
            part.aligned = all(address % 16 == 0 for row in rows for address in row[:5])
        if capturing:
            self._captured.append((part.table, part.chunks, part.tasks))
        first = {
            number: layer for layer, row in zip(reversed(own), reversed(rows), strict=True) for number in row[-2:-1]
        }
        return self._numbers([first[number] for number in range(len(first))], layers.scaling, device)

    def _numbers(self, layers: Sequence[Layer], scaling: Scaling | None, device: torch.device) -> Tensor:
        """Return the rows of numbers of some layers, [H, NUMBERS] float64. What is on the device never leaves it."""
        table = [numbers_of(layer, scaling) for layer in layers]
        table = [[float(a) if isinstance(a, Tensor) and a.device != device else a for a in row] for row in table]
        if not any(isinstance(a, Tensor) for row in table for a in row):
            return self._send(torch.tensor(table, dtype=torch.float64, device="cpu"), device)
        columns = []
        for column in zip(*table, strict=True):
            runs = [list(run) for _, run in groupby(column, key=lambda a: "tensor" if isinstance(a, Tensor) else a)]
            filled = [
                torch.stack(run).double()
                if isinstance(run[0], Tensor)
                else torch.full((len(run),), float(run[0]), dtype=torch.float64, device=device)
                for run in runs
            ]
            columns.append(torch.cat(filled))
        return torch.stack(columns, dim=1)

    def _send(self, table: Tensor, device: torch.device) -> Tensor:
        """Copy a table to the device without waiting for it."""
        if device.type != "cuda":
            return table
        table = table.pin_memory()
        if torch.cuda.is_current_stream_capturing():
            self._captured.append(table)  # the copy is part of the graph
        return table.to(device, non_blocking=True)


BACKEND = Triton()


def current_device_of(layers: Layers) -> Any:
    """Make the device of these layers the current one, on which kernels are launched, for a while."""
    return torch.cuda.device_of(layers[0].x)  # type: ignore[no-untyped-call]


def interpreted() -> bool:
    """Say whether Triton interprets the kernels on the CPU."""
    return type(kernels.direct).__name__ == "InterpretedFunction"


def num_programs(device: torch.device) -> int:
    """Return how many programs share the tasks of the one launch; interpreted, the first does them all."""
    if device.type != "cuda":
        return 2
    return PROGRAMS_EACH * torch.cuda.get_device_properties(device).multi_processor_count


def tasks(num_chunks: Sequence[int], lag: int) -> list[int]:
    """Return the order of the tasks of `triton_kernels.whole` for layers of so many chunks each.

    The second pass over a layer begins ``lag`` tasks after the last of its first: later it would have left the cache,
    earlier it would wait for programs that are still at it. It goes backwards, from what is surely in cache.
    """
    ordered: list[int] = []
    waiting: deque[tuple[int, range]] = deque()
    first = 0
    for num in num_chunks:
        for chunk in range(first, first + num):
            ordered.append(2 * chunk)
            while waiting and waiting[0][0] <= len(ordered):
                ordered += [2 * again + 1 for again in waiting.popleft()[1]]
        waiting.append((len(ordered) + lag, range(first + num - 1, first - 1, -1)))
        first += num
    return ordered + [2 * again + 1 for _, layer in waiting for again in layer]


def second_pass(rule: str, part: Part, layers: Layers) -> dict[str, Any]:
    hypers = {id(layers[owner].hyper): layers[owner].hyper for owner in part.owners}
    return {
        "rounded_type": TYPES[part.rounded or part.dtypes[0]],
        "rounds": part.rounded is not None,
        "reads_g": rule == "lars2017" or any(map(needs_g, hypers.values())),
    }


def touch(layers: Layers) -> None:
    """Tell autograd that the weights have changed."""
    moved = [tensor for layer in layers for tensor in (layer.x, layer.rounded) if tensor is not None]
    torch.autograd.graph.increment_version(moved)


def types(part: Part) -> dict[str, Any]:
    x, g, state = part.dtypes
    compute = torch.promote_types(x, torch.float32)
    return {
        "x_type": TYPES[x],
        "g_type": TYPES[g],
        "state_type": TYPES[state],
        "compute": TYPES[compute],
        "aligned": part.aligned,
    }


def needs_g(hyper: Any) -> bool:
    """Say whether u is a function of the gradient, beyond what the state holds of it."""
    scales = [getattr(hyper, name, 0.0) for name in ("g_scale", "g_sq_scale", "nesterov")]
    return any(isinstance(scale, Tensor) or scale != 0 for scale in scales)


def numbers_of(layer: Layer, scaling: Scaling | None) -> list[Any]:
    """Return a layer's row of numbers, in the order of `triton_kernels.NUMBERS`."""
    numbers = dict(layer.hyper._asdict())
    numbers |= {"grad_scale": 1.0} if scaling is None else {"grad_scale": scaling.scale, "found_inf": scaling.found_inf}
    if layer.ratio is not None:
        phi, bounds = layer.ratio.phi, layer.ratio.bounds
        low, high = (-math.inf, math.inf) if phi is None or callable(phi) else phi
        lower, upper = bounds or (-math.inf, math.inf)
        numbers |= layer.ratio._asdict() | {"eps_of_ratio": layer.ratio.eps, "adapt": 1}
        numbers |= {"low": low, "high": high, "lower": lower, "upper": upper}
        numbers["eps"] = getattr(layer.hyper, "eps", 0.0)
    return [numbers.get(name, 0.0) for name in kernels.NUMBERS]


# ---- layers that lie in memory in another way than kernels walk ----


def aligned(layer: Layer, copies: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Return x, what it is rounded to (or x again), g and the state, all in one order in memory and without holes.

    Args:
        layer: the tensors.
        copies: where to note (original, copy) of those that had to be copied, but for g.
    """
    tensors = [layer.x, layer.x if layer.rounded is None else layer.rounded, layer.g.resolve_neg()]
    check_shape("gradient", layer.name, layer.g, layer.x)
    for a in layer.state.values():
        check_shape("state", layer.name, a, layer.x)
        tensors.append(a)
    if all(a.is_contiguous() for a in tensors):
        return tensors
    state = tensors[3]  # by whose order its elements are rounded
    order = sorted(range(state.dim()), key=state.stride, reverse=True)
    views = [a.permute(order) for a in tensors]
    made = [view.contiguous() for view in views]
    views[2] = made[2]
    if layer.rounded is None:
        views[1] = made[1] = made[0]
    copies += [(view, copy) for view, copy in zip(views, made, strict=True) if copy is not view]
    return made


def finish(part: Part) -> None:
    """Bring home what was copied, and let go of it and of the gradients."""
    for original, copy in part.copies:
        original.copy_(copy)
    part.copies, part.grads = [], []
