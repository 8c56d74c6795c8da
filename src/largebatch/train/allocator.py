"""Keep freed memory in the process, so that a training step on a CPU takes no page faults.

glibc serves a block of 128 kB and more (up to 32 MB, by a threshold it adapts) with `mmap`, and gives it back to the
kernel when it is freed. Training frees and asks for the same large blocks every step, and the kernel has to map and
clear each page again.
"""

import ctypes
import sys

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
_TOP_PAD_BYTES = 64 * 2**20


def keep_freed_memory() -> str:
    """Tell glibc's allocator to take no block from `mmap` and to give no memory back.

    The process's resident size stays at its peak from then on. Elsewhere than on glibc nothing is changed.

    Returns:
        The setting in words, for the run's record.
    """
    mallopt = _mallopt()
    if mallopt is None:
        return "as it comes (not glibc)"
    applied = mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1) and mallopt(_M_TOP_PAD, _TOP_PAD_BYTES)
    return "mallopt: M_MMAP_MAX=0, M_TRIM_THRESHOLD=-1, M_TOP_PAD=64 MiB" if applied else "as it comes (mallopt failed)"


def restore_defaults() -> None:
    """Undo `keep_freed_memory`: glibc's documented defaults, without the adaptive threshold."""
    mallopt = _mallopt()
    if mallopt is not None:
        for option, value in ((_M_MMAP_MAX, 65536), (_M_TRIM_THRESHOLD, 2**17), (_M_TOP_PAD, 2**17)):
            mallopt(option, value)
        mallopt(_M_MMAP_THRESHOLD, 2**17)


def give_back() -> None:
    """Restore the defaults, and return to the kernel what is free."""
    restore_defaults()
    if _mallopt() is not None:
        ctypes.CDLL(None).malloc_trim(0)


def _mallopt() -> "ctypes._NamedFuncPointer | None":
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return None
    libc.mallopt.argtypes, libc.mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    return libc.mallopt
