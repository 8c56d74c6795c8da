"""The shared library that setup.py builds from the C sources beside this file, and what it is handed."""

import ctypes
from pathlib import Path

import numpy as np
import torch

from largebatch import compiled

# `struct layer` and `struct numbers` of native.h, field by field.
LAYER = np.dtype(
    [
        ("x", np.uintp),
        ("g", np.uintp),
        ("state", np.uintp, 2),
        ("rounded", np.uintp),
        ("count", np.int64),
        ("origin", np.int64, 3),
        ("position", np.uint32),
        ("numbers", np.int32),
        ("x_dtype", np.int8),
        ("g_dtype", np.int8),
        ("state_dtype", np.int8),
        ("rounded_dtype", np.int8),
    ],
    align=True,
)
NUMBERS = np.dtype(
    [
        *((name, np.float64) for name in ("rate", "keep", "beta1", "beta2", "eps", "weight_decay")),
        *((name, np.float64) for name in ("m_scale", "g_scale", "v_scale", "g_sq_scale", "momentum")),
        *((name, np.float64) for name in ("shrink", "low", "high", "ratio_eps", "ratio_decay", "coefficient")),
        *((name, np.float64) for name in ("lower", "upper")),
        ("t", np.uint32),
        *((name, np.int32) for name in ("maximize", "nesterov", "adapt")),
    ],
    align=True,
)

# The enumerations of native.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
RULES = {"lamb": 0, "lars": 1, "lars2017": 2}
NORMS = {"l2": 0, "l1": 1, "linf": 2}
DIRECT, DESCEND = 1, 2


def load() -> ctypes.CDLL:
    """Load the library.

    Raises:
        ImportError: as for `compiled.load`, or it was built from other sources.
    """
    library = compiled.load(Path(__file__).parent)
    address, integer, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    library.largebatch_layout.argtypes = [address]
    library.largebatch_count.argtypes = [address, long, address]
    library.largebatch_step.argtypes = [address, long, address, integer, integer, integer, integer, address, address]
    for function in (library.largebatch_layout, library.largebatch_count, library.largebatch_step):
        function.restype = None
    sizes = (ctypes.c_int64 * 2)()
    library.largebatch_layout(sizes)
    if list(sizes) != [LAYER.itemsize, NUMBERS.itemsize]:
        raise ImportError("the CPU kernel was compiled from other sources than these; reinstall largebatch")
    return library
