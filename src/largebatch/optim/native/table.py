"""What the kernel is told about the layers, in arrays that are filled in anew only where something changed.

Over thousands of small layers a step's time is Python's. What is done here for each layer at each step is therefore one
call in a `map`, and for its gradient, as long as that looks as it did, one in C (`locate`).
"""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..backends import Layer, Layers, Run
from ..checks import check, check_dense, check_shape
from .library import DTYPES, LAYER, NUMBERS
from .locate import Layouts, Locator, OwnLayouts, Sizes, addresses

Rows = NDArray[np.void]


class Table:
    """The layers of one optimizer and device, as the kernel reads them."""

    def __init__(self, layers: Layers, locate: Locator) -> None:
        for layer in layers:
            check_owned(layer)
        self.locate = locate
        self.shapes = [layer.x.shape for layer in layers]
        everything = [tensor for layer in layers for tensor in owned(layer)]
        self.owned = OwnLayouts(everything)
        self.addresses = addresses(everything)
        self.storages = [tensor.untyped_storage() for tensor in everything]  # kept alive
        self.moved = [tensor for layer in layers for tensor in (layer.x, layer.rounded) if tensor is not None]
        self.irregular = [i for i, layer in enumerate(layers) if not in_one_order(owned(layer))]
        self.orders = [layer.x.stride() for layer in layers]
        for i in self.irregular:
            state = next(iter(layers[i].state.values()))  # by whose order its elements are rounded
            self.orders[i] = torch.empty_like(state, device="meta").stride()
        self.strides = list(self.orders)  # of gradients that can be read as they are
        self.dtypes = [layer.x.dtype for layer in layers]
        self.layouts = Layouts(self.dtypes, self.shapes, self.strides)
        self.singles = [i for i, shape in enumerate(self.shapes) if shape.numel() == 1]
        self.counts: list[int] = []  # of layers that share a row of numbers
        self.rows: Rows = np.zeros(len(layers), LAYER)
        for row, layer in zip(self.rows, layers, strict=True):
            row["position"], row["origin"] = layer.position, layer.origin
            enter(row, owned(layer), layer.rounded is not None)
        self.rows["g_dtype"] = self.rows["x_dtype"]

    def is_current(self) -> bool:
        """Say whether weights and state lie where and as they did.

        `Module.to` and its like assign to a tensor's ``data``, and a storage that is shared with another process moves.
        """
        found = self.locate.again(self.owned)
        return found is not None and np.array_equal(found, self.addresses)

    def enter_gradients(self, layers: Layers) -> list[Tensor]:
        """Enter the gradients, and return them: some are copies, which live as long as the list does."""
        for i in self.singles:  # of a complex number's conjugate, say; only one element passes as an ordinary tensor
            if layers.grads[i].is_neg():
                layers.grads[i] = layers.grads[i].resolve_neg()
        found = self.locate(layers.grads, self.layouts)
        if found is not None:
            self.rows["g"] = found
            return layers.grads
        grads = list(layers.grads)
        try:
            where = addresses(grads)
        except RuntimeError:
            check_dense(grads)
            raise
        for layer, g in zip(layers, grads, strict=True):
            check_shape("gradient", layer.name, g, layer.x)
        strides, dtypes = list(map(Tensor.stride, grads)), [g.dtype for g in grads]
        if strides != self.strides or dtypes != self.dtypes:
            for i, g in enumerate(grads):
                if strides[i] != self.strides[i] or dtypes[i] != self.dtypes[i]:
                    grads[i] = readable(g, self.orders[i])
                    where[i] = grads[i].data_ptr()
                    self.rows["g_dtype"][i] = DTYPES[grads[i].dtype]
                    self.strides[i], self.dtypes[i] = grads[i].stride(), grads[i].dtype
            self.layouts = Layouts(self.dtypes, self.shapes, self.strides)
        self.rows["g"] = where
        return grads

    def enter_numbers(self, layers: Layers) -> Rows:
        """Enter which of the rows of numbers, which are returned, is each layer's."""
        counts = [run.num_layers for run in layers.runs]
        if counts != self.counts:
            self.counts = counts
            self.rows["numbers"] = np.repeat(np.arange(len(counts)), counts)
        numbers: Rows = np.zeros(len(counts), NUMBERS)
        for row, run in zip(numbers, layers.runs, strict=True):
            for name, value in numbers_of(run).items():
                row[name] = value
        return numbers

    def substitute(self, layers: Layers) -> list[tuple[Tensor, Tensor]]:
        """Enter dense copies of the layers that the kernel cannot walk through; return pairs (original, copy)."""
        pairs: list[tuple[Tensor, Tensor]] = []
        for i in self.irregular:
            layer = layers[i]
            originals = owned(layer)
            copies = [readable(original, self.orders[i]) for original in originals]
            enter(self.rows[i], copies, layer.rounded is not None)
            pairs += [pair for pair in zip(originals, copies, strict=True) if pair[0] is not pair[1]]
        return pairs


def owned(layer: Layer) -> list[Tensor]:
    """Return the tensors of a layer that a step changes: x, the state, and what x is rounded to."""
    tensors = [layer.x, *layer.state.values()]
    return tensors if layer.rounded is None else [*tensors, layer.rounded]


def check_owned(layer: Layer) -> None:
    """Refuse what would have the kernel read and write memory that is not the layer's."""
    for tensor in owned(layer):
        check_shape("state", layer.name, tensor, layer.x)
        is_known = tensor.dtype in DTYPES and tensor.device.type == "cpu"
        check("state", tensor.dtype, is_known, f"one of {', '.join(map(str, DTYPES))}, on the CPU")


def enter(row: Any, tensors: list[Tensor], has_master: bool) -> None:
    """Describe what `owned` returned of a layer, or copies of that."""
    x, *state = tensors
    rounded = state.pop() if has_master else None
    row["count"] = x.numel()
    row["x"], row["x_dtype"] = x.data_ptr(), DTYPES[x.dtype]
    row["state"] = [tensor.data_ptr() for tensor in state] + [0] * (2 - len(state))
    row["state_dtype"] = DTYPES[state[0].dtype]
    if rounded is not None:
        row["rounded"], row["rounded_dtype"] = rounded.data_ptr(), DTYPES[rounded.dtype]


def walk(shape: torch.Size, strides: Sizes) -> list[tuple[int, int]]:
    """Return stride and size of the dimensions that tell where in memory an element lies."""
    return [(stride, size) for stride, size in zip(strides, shape, strict=True) if size > 1]


def in_one_order(tensors: list[Tensor]) -> bool:
    """Say whether tensors of one shape lie in memory in the same order, without holes."""
    if not tensors[0].numel():
        return True
    expected, (first, *others) = 1, [walk(tensor.shape, tensor.stride()) for tensor in tensors]
    for stride, size in sorted(first):
        if stride != expected:
            return False
        expected *= size
    return all(other == first for other in others)


def readable(g: Tensor, order: Sizes) -> Tensor:
    """Return a gradient in this order and in a dtype the kernel knows: itself, or a copy."""
    dtype = g.dtype if g.dtype in DTYPES else torch.float32
    if dtype is g.dtype and walk(g.shape, g.stride()) == walk(g.shape, order):
        return g
    return g.new_empty_strided(g.shape, order, dtype=dtype).copy_(g)


def numbers_of(run: Run) -> dict[str, float]:
    """Return what a row of numbers holds, from the rule's numbers and the group's ratio."""
    numbers = {name: float(value) for name, value in run.hyper._asdict().items()}
    if run.ratio is None:
        return numbers
    phi = run.ratio.phi  # a callable is for `norms.trust_ratio`, between the two passes
    low, high = (-math.inf, math.inf) if phi is None or callable(phi) else phi
    lower, upper = run.ratio.bounds or (-math.inf, math.inf)
    return numbers | {
        "adapt": 1,
        "shrink": float(run.ratio.shrink),
        "low": low,
        "high": high,
        "ratio_eps": run.ratio.eps,
        "ratio_decay": run.ratio.decay,
        "coefficient": run.ratio.coefficient,
        "lower": lower,
        "upper": upper,
    }
