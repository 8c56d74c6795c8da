"""Where tensors lie, and how, by DLPack's interface in C: one call for all of them, where Python makes three for each.

Versions of torch without it, and tensors that it does not describe, are left to `table.py`'s own way.
"""

import ctypes
from collections.abc import Sequence
from itertools import accumulate, chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Strides = tuple[int, ...]

# DLDataType as one number: code, bits and lanes from the lowest byte on.
_TYPES = {
    torch.float32: 2 | 32 << 8 | 1 << 16,
    torch.float16: 2 | 16 << 8 | 1 << 16,
    torch.bfloat16: 4 | 16 << 8 | 1 << 16,
}


class Layouts:
    """The dtypes, among those that the kernel reads, and the strides that tensors are expected to have."""

    def __init__(self, dtypes: Sequence[torch.dtype], strides: Sequence[Strides]) -> None:
        self.types = np.fromiter(map(_TYPES.__getitem__, dtypes), np.uint32, len(dtypes))
        self.ends = np.fromiter(accumulate(map(len, strides)), np.int64, len(strides))
        self.strides = np.fromiter(chain.from_iterable(strides), np.int64)


class Locator:
    """Finds tensors in memory.

    Attributes:
        describe: the address of torch's function for it; None if this version has none.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.describe = _describe()
        # The interpreter's lock is kept: torch's function may raise.
        prototype = ctypes.PYFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 2, ctypes.c_int64, *[ctypes.c_void_p] * 4)
        self._locate = prototype(("largebatch_locate", library))

    def __call__(self, tensors: Sequence[Tensor], layouts: Layouts) -> NDArray[np.uintp] | None:
        """Return the addresses of tensors on the CPU; None if a layout is another, or it cannot be told."""
        if self.describe is None:
            return None
        objects = np.fromiter(tensors, object, len(tensors))
        found = np.empty(len(tensors), np.uintp)
        arrays = (objects, found, layouts.types, layouts.ends, layouts.strides)
        objects_at, *others = (array.ctypes.data for array in arrays)
        try:
            are_as_expected = self._locate(self.describe, objects_at, len(objects), *others)
        except RuntimeError:  # a sparse tensor, for one
            return None
        return found if are_as_expected else None


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
