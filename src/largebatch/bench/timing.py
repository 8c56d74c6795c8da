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
Clock = Callable[[Work, torch.device], float]


def wall_seconds(work: Work, device: torch.device) -> float:
    """Return how long ``work`` takes, and what it asked of the device."""
    _synchronize(device)
    start = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - start


def gpu_seconds(lead_s: float) -> Clock:
    """Return a clock of the GPU's own time: it begins ``lead_s`` late, by when all that it is to do has been queued.

    The host's time and its waiting for the first kernel are not in it; training queues a step long before the GPU comes
    to it. Work that waits for the device within is longer than the lead, and is measured with its waiting.
    """

    def clock(work: Work, device: torch.device) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        torch.cuda._sleep(int(2e9 * lead_s))  # cycles, of which no GPU has more than 2e9 in a second
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        return 1e-3 * begin.elapsed_time(end)

    return clock


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    contenders: Mapping[str, Work],
    device: torch.device,
    rounds: int,
    warm_up: int = 2,
    before: Callable[[str], object] = lambda name: None,
    settle: int = 0,
    clock: Clock = wall_seconds,
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
            times[name].append(clock(work, device))
    return {name: values[warm_up:] for name, values in times.items()}


def set_allocator(tuned: bool) -> str:
    """Have freed memory kept by the process, as the training command does, or not; return the setting in words."""
    if tuned:
        return allocator.keep_freed_memory()
    allocator.restore_defaults()
    return "as it comes"


def copy_bytes_per_s(device: torch.device) -> float:
    """Return how many bytes a large copy reads and writes in a second: what a pass over memory can reach.

    256 MB on a CPU. 4 GB on a GPU, whose cache holds tens of MB, after as many copies as bring it out of idling.
    """
    on_gpu = device.type == "cuda"
    source = torch.randn(1 << (30 if on_gpu else 26), device=device)
    target = torch.empty_like(source)
    times = interleaved(
        {"copy": lambda: target.copy_(source)},
        device,
        rounds=10,
        warm_up=200 if on_gpu else 2,
        clock=gpu_seconds(1e-3) if on_gpu else wall_seconds,
    )
    return 2 * source.numel() * source.element_size() / statistics.median(times["copy"])


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
