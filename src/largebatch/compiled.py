"""Loads the shared libraries that setup.py builds from C sources."""

import ctypes
import os
from pathlib import Path

# The best instruction set to use: "baseline", "avx2" or "avx512". Unset, it is the best that the processor has.
ISA_VARIABLE = "LARGEBATCH_NATIVE_ISA"


def load(folder: Path) -> ctypes.CDLL:
    """Load the library of a folder and choose its instruction set.

    Raises:
        ImportError: it was not built, cannot be loaded, or the environment asks for what it does not have.
    """
    path = folder / "kernels.so"
    if not path.exists():
        raise ImportError("the CPU kernel was not compiled when largebatch was installed; reinstall with a C compiler")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(f"the CPU kernel cannot be loaded: {error}") from error
    library.largebatch_choose.argtypes, library.largebatch_choose.restype = [ctypes.c_char_p], ctypes.c_char_p
    choose(library, os.environ.get(ISA_VARIABLE))
    return library


def choose(library: ctypes.CDLL, highest: str | None) -> str:
    """Use the best instruction set of this processor up to ``highest``, and return its name."""
    chosen: bytes | None = library.largebatch_choose(highest.encode() if highest else None)
    if chosen is None:
        raise ImportError(f"{ISA_VARIABLE}={highest!r}: expected 'baseline', 'avx2' or 'avx512'")
    return chosen.decode()
