"""Find the micro-batch: the largest that fits on a GPU, the fastest on a CPU."""

import resource
import time
from collections.abc import Callable

import torch

from largebatch.train.hardware import available_memory_bytes

# The largest share of the device's memory that a probe may have used.
_MEMORY_SHARE = 0.85
_LARGEST = 4096


def divisors(batch_size: int, largest: int = _LARGEST) -> list[int]:
    """The micro-batch sizes that cut `batch_size` evenly, from the smallest on, up to `largest`."""
    return [size for size in range(1, min(batch_size, largest) + 1) if batch_size % size == 0]


def find_micro_batch(
    probe: Callable[[int], None],
    batch_size: int,
    device: torch.device,
    reserve_bytes: int = 0,
    agree: Callable[[float], float] = float,
) -> int:
    """Choose a divisor of `batch_size` by trying some.

    Args:
        probe: `probe(size)` runs forward and backward on a micro-batch of this many samples of full length.
        batch_size: samples of this rank in a global batch.
        device: where the probe runs.
        reserve_bytes: memory to leave for what the probe does not allocate, such as the optimizer's state.
        agree: returns the largest value of any rank, so that all ranks try and choose the same sizes.

    Returns:
        On CUDA the largest size that leaves a margin of memory, on a CPU the one with the least time per sample.
    """
    candidates = _thin_out(divisors(batch_size))
    if device.type == "cuda":
        return _largest_that_fits(probe, candidates, device, reserve_bytes, agree)
    return _fastest(probe, candidates, device, agree)


def _thin_out(sizes: list[int]) -> list[int]:
    """Keep sizes that are at least 1.4 times the one before: neighbours differ too little to be worth a probe."""
    kept = sizes[:1]
    for size in sizes[1:]:
        if size >= 1.4 * kept[-1]:
            kept.append(size)
    return kept


def _largest_that_fits(
    probe: Callable[[int], None],
    candidates: list[int],
    device: torch.device,
    reserve_bytes: int,
    agree: Callable[[float], float],
) -> int:
    limit = _MEMORY_SHARE * torch.cuda.get_device_properties(device).total_memory - reserve_bytes
    best = candidates[0]
    for size in candidates:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        try:
            probe(size)
            torch.cuda.synchronize(device)
            too_large = torch.cuda.max_memory_reserved(device) > limit
        except torch.OutOfMemoryError:
            too_large = True
        if agree(too_large):
            break
        best = size
    torch.cuda.empty_cache()
    return best


def _fastest(
    probe: Callable[[int], None], candidates: list[int], device: torch.device, agree: Callable[[float], float]
) -> int:
    # Below some sequences a CPU has too little to do in one operation to be worth a probe.
    worth_trying = [size for size in candidates if size >= 8] or candidates[-1:]
    best, best_s = worth_trying[0], float("inf")
    for size in worth_trying:
        resident_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        probe(size)
        per_sample_s = agree(min(_seconds(probe, size) for _ in range(2)) / size)
        if per_sample_s < best_s:
            best, best_s = size, per_sample_s
        elif per_sample_s > 1.1 * best_s:
            break
        grown_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident_before) * 1024
        if agree(4 * grown_bytes > available_memory_bytes(device)):
            break
    return best


def _seconds(probe: Callable[[int], None], size: int) -> float:
    start = time.perf_counter()
    probe(size)
    return time.perf_counter() - start
