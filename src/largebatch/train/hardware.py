"""What a run runs on: its description for the record, and the speed that MFU is a fraction of."""

import os
import platform
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from largebatch.train import distributed


def describe(device: torch.device, allocator: str) -> dict[str, Any]:
    """Software, hardware and settings, for `env.json`."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "gpu_memory_bytes": torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
        "world_size": distributed.world_size(),
        "allocator": allocator,
        "git_commit": _git_commit(),
        "command": _command(),
        "started_utc": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """The rate of a large matrix product here, the peak that MFU is measured against.

    The fastest of several products, as other work on the machine can only slow one down; under a second in all.
    """
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    times = []
    for _ in range(12):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def bf16_is_fast(device: torch.device) -> bool:
    """Whether bfloat16 matrix products have units of their own here."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    flags = _cpu_flags()
    return "avx512_bf16" in flags or "amx_bf16" in flags or "bf16" in flags


def available_memory_bytes(device: torch.device) -> int:
    """Free memory on the device; on a CPU what the kernel says can be had without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return _memory_bytes() // 2


def _command() -> str:
    """The command line in the shell's words; what `python -m` and torchrun start goes by its package's name."""
    program = Path(sys.argv[0])
    name = program.parent.name if program.name == "__main__.py" else program.name
    return shlex.join([name, *sys.argv[1:]])


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu_name() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cpu_flags() -> set[str]:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.split(":", 1)[1].split())
    return set()


def _git_commit() -> str | None:
    """The commit of the source tree this package runs from, if it runs from one."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(
            command, cwd=here.parent, capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # installed into somebody's own repository, it is not of it
        return git("rev-parse", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
