"""Where tensors lie, and how, by DLPack's interface in C: one call for all of them, where Python makes four for each.

Python makes them where a version of torch is without it.
"""

import ctypes
from collections.abc import Sequence
from itertools import accumulate, chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Sizes = tuple[int, ...]
Tensors = Sequence[Tensor] | NDArray[np.object_]  # an array where they are the same ones at every step

# DLDataType as one number: code, bits and lanes from the lowest byte on.
_TYPES = {
    torch.float32: 2 | 32 << 8 | 1 << 16,
    torch.float16: 2 | 16 << 8 | 1 << 16,
    torch.bfloat16: 4 | 16 << 8 | 1 << 16,
}


class Layouts:
    """How tensors are expected to lie: their dtypes, among those that the kernel reads, shapes and strides.

    Args:
        hints: [n, 2], where each tensor and its storage may be found; None if they are others at every step.
    """

    def __init__(
        self,
        dtypes: Sequence[torch.dtype],
        shapes: Sequence[Sizes],
        strides: Sequence[Sizes],
        hints: NDArray[np.uintp] | None = None,
    ) -> None:
        self.all = list(zip(dtypes, map(tuple, shapes), strides, strict=True))
        self.types = np.fromiter(map(_TYPES.__getitem__, dtypes), np.uint32, len(dtypes))
        self.ends = np.fromiter(accumulate(map(len, strides)), np.int64, len(strides))
        dimensions = chain.from_iterable(map(zip, shapes, strides))
        self.sizes = np.fromiter(chain.from_iterable(dimensions), np.int64)
        self.hints = hints

    @classmethod
    def of(cls, tensors: Tensors) -> "Layouts":
        """Return how these tensors lie, which are the same objects at every step."""
        hints = np.array([(x._cdata, x.untyped_storage()._cdata) for x in tensors], np.uintp)
        return cls([x.dtype for x in tensors], [x.shape for x in tensors], [x.stride() for x in tensors], hints)


class Locator:
    """Finds tensors in memory.

    Attributes:
        describe: the address of torch's function for it; None if this version has none.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.describe = _describe()
        # The interpreter's lock is kept: torch's function may raise.
        prototype = ctypes.PYFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 2, ctypes.c_int64, *[ctypes.c_void_p] * 5)
        self._locate = prototype(("largebatch_locate", library))

    def __call__(self, tensors: Tensors, layouts: Layouts) -> NDArray[np.uintp] | None:
        """Return the addresses of tensors on the CPU; None if a layout is another, or it cannot be told."""
        try:
            if self.describe is None:
                found = [(x.dtype, tuple(x.shape), x.stride()) for x in tensors if x.device.type == "cpu"]
                return addresses(tensors) if found == layouts.all else None
            objects = tensors if isinstance(tensors, np.ndarray) else in_array(tensors)
            where = np.empty(len(tensors), np.uintp)
            arrays = (objects, where, layouts.types, layouts.ends, layouts.sizes)
            objects_at, *others = (array.ctypes.data for array in arrays)
            hints_at = None if layouts.hints is None else layouts.hints.ctypes.data
            return where if self._locate(self.describe, objects_at, len(objects), *others, hints_at) else None
        except RuntimeError:  # a sparse tensor, for one
            return None


def in_array(tensors: Sequence[Tensor]) -> NDArray[np.object_]:
    return np.fromiter(tensors, object, len(tensors))


def addresses(tensors: Tensors) -> NDArray[np.uintp]:
    return np.fromiter(map(Tensor.data_ptr, tensors), np.uintp, len(tensors))


class _Interface(ctypes.Structure):
    """DLPackExchangeAPI of DLPack 1."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("previous", ctypes.c_void_p),
        ("managed_tensor_allocator", ctypes.c_void_p),
        ("managed_tensor_from_py_object_no_sync", ctypes.c_void_p),
        ("managed_tensor_to_py_object_no_sync", ctypes.c_void_p),
        ("dltensor_from_py_object_no_sync", ctypes.c_void_p),
        ("current_work_stream", ctypes.c_void_p),
    )


def _describe() -> int | None:
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return None
    prototype = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    interface = _Interface.from_address(
        prototype(("PyCapsule_GetPointer", ctypes.pythonapi))(capsule, b"dlpack_exchange_api")
    )
    address: int | None = interface.dltensor_from_py_object_no_sync if interface.major == 1 else None
    return address
