"""Comparisons that a shared machine cannot spoil: members of one process take turns; ratios of medians are told."""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from largebatch.train import allocator, hardware

Work = Callable[[], object]


def interleaved(
    contenders: Mapping[str, Work],
    device: torch.device,
    rounds: int,
    warm_up: int = 2,
    before: Callable[[str], object] = lambda name: None,
    settle: int = 0,
) -> dict[str, list[float]]:
    """Return the seconds of each contender in rounds in which all take their turn.

    Not timed are ``before`` each turn, and so many runs in it as ``settle`` says: they bring back the memory that
    others took over or returned, which a step in training finds as the last one left it.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + warm_up):
        for name, work in contenders.items():
            before(name)
            for _ in range(settle):
                work()
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(time.perf_counter() - start)
    return {name: values[warm_up:] for name, values in times.items()}


def set_allocator(tuned: bool) -> str:
    """Have freed memory kept by the process, as the training command does, or not; return the setting in words."""
    if tuned:
        return allocator.keep_freed_memory()
    allocator.restore_defaults()
    return "as it comes"


def copy_bytes_per_s(device: torch.device) -> float:
    """Return how many bytes a copy of 256 MB reads and writes in a second: what a pass over memory can reach."""
    source = torch.ones(1 << 26, device=device)
    target = torch.empty_like(source)
    seconds = statistics.median(interleaved({"copy": lambda: target.copy_(source)}, device, rounds=10)["copy"])
    return 2 * source.numel() * source.element_size() / seconds


def peak_extra_bytes(work: Work, device: torch.device) -> int | None:
    """Return by how much memory grows while ``work`` runs; None where the system does not tell.

    On the CPU glibc is told to give freed memory back before and to take it anew, so that temporaries are seen; the
    caller's setting of the allocator is gone afterwards.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    allocator.give_back()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
        before = _status_bytes("VmRSS")
        work()
        return max(0, _status_bytes("VmHWM") - before)
    except (OSError, KeyError):
        return None


def _status_bytes(key: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def write_figures(path: Path, figures: list[dict[str, Any]], device: torch.device) -> None:
    """Keep the figures with what they were measured on; the command's paths are not among them."""
    environment = hardware.describe(device, "see the figures")
    del environment["command"]
    environment["written_utc"] = environment.pop("started_utc")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment, "figures": figures}, indent=1) + "\n")
