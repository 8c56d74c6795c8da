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

# DLDataType as one number: code, bits and lanes from the lowest byte on.
_TYPES = {
    torch.float32: 2 | 32 << 8 | 1 << 16,
    torch.float16: 2 | 16 << 8 | 1 << 16,
    torch.bfloat16: 4 | 16 << 8 | 1 << 16,
}


class Layouts:
    """How tensors are expected to lie: their dtypes, among those that the kernel reads, shapes and strides.

    Addresses of arrays are kept, as asking for them takes longer than the step of a small layer.

    Attributes:
        found: where they lie, as of the last time that they were looked for.
    """

    def __init__(self, dtypes: Sequence[torch.dtype], shapes: Sequence[Sizes], strides: Sequence[Sizes]) -> None:
        self.all = list(zip(dtypes, map(tuple, shapes), strides, strict=True))
        self.found = np.empty(len(dtypes), np.uintp)
        types = np.fromiter(map(_TYPES.__getitem__, dtypes), np.uint32, len(dtypes))
        ends = np.fromiter(accumulate(map(len, strides)), np.int64, len(strides))
        sizes = np.fromiter(chain.from_iterable(chain.from_iterable(map(zip, shapes, strides))), np.int64)
        self._arrays = (self.found, types, ends, sizes)
        self.arrays_at = [array.ctypes.data for array in self._arrays]


class OwnLayouts(Layouts):
    """How tensors lie that are the same objects at every step."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__([x.dtype for x in tensors], [x.shape for x in tensors], [x.stride() for x in tensors])
        self.tensors = list(tensors)  # not an array, through which the garbage collector sees no cycle
        self._ids = np.fromiter(map(id, tensors), np.uintp, len(tensors))  # where the objects lie
        self._hints = np.array([(x._cdata, x.untyped_storage()._cdata) for x in tensors], np.uintp)
        self.ids_at, self.hints_at = self._ids.ctypes.data, self._hints.ctypes.data


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

    def again(self, own: OwnLayouts) -> NDArray[np.uintp] | None:
        """Return the addresses of tensors that were seen before; as `__call__`."""
        return self._find(own, own.tensors, own.ids_at, own.hints_at)

    def __call__(self, tensors: Sequence[Tensor], layouts: Layouts) -> NDArray[np.uintp] | None:
        """Return the addresses of tensors on the CPU; None if a layout is another, or it cannot be told.

        The array is that of ``layouts``, and holds until it is asked for anew.
        """
        objects = np.fromiter(tensors, object, len(tensors))
        return self._find(layouts, tensors, objects.ctypes.data, None)

    def _find(
        self, layouts: Layouts, tensors: Sequence[Tensor], objects_at: int, hints_at: int | None
    ) -> NDArray[np.uintp] | None:
        try:
            if self.describe is None:
                lie = [(x.dtype, tuple(x.shape), x.stride()) for x in tensors if x.device.type == "cpu"]
                if lie != layouts.all:
                    return None
                layouts.found[:] = addresses(tensors)
                return layouts.found
            found_at, *expected_at = layouts.arrays_at
            is_found = self._locate(self.describe, objects_at, len(tensors), found_at, *expected_at, hints_at)
            return layouts.found if is_found else None
        except RuntimeError:  # a sparse tensor, for one
            return None


def addresses(tensors: Sequence[Tensor]) -> NDArray[np.uintp]:
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
