"""The search for a micro-batch: only divisors, the fastest on a CPU, and a stop when larger ones get slower."""

from types import SimpleNamespace

import pytest
import torch

from largebatch.train import micro_batch
from largebatch.train.micro_batch import divisors, find_micro_batch

CPU = torch.device("cpu")


def test_divisors():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(7) == [1, 7]
    assert divisors(65536, largest=64) == [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize("best", [16, 64])
def test_the_fastest_per_sample_wins(monkeypatch, best):
    """On a clock of our own the time per sample falls up to `best` and rises after it."""
    tried, now = [], [0.0]
    monkeypatch.setattr(micro_batch.time, "perf_counter", lambda: now[0])

    def probe(size):
        tried.append(size)
        now[0] += 2e-3 + size * (1e-4 if size <= best else 6e-4)

    assert find_micro_batch(probe, 512, CPU) == best
    assert max(tried) == 2 * best


def test_a_small_batch_is_its_own_micro_batch():
    assert find_micro_batch(lambda size: None, 4, CPU) == 4


def test_a_prime_batch_is_taken_whole_or_in_ones():
    assert find_micro_batch(lambda size: None, 13, CPU) == 13


def test_on_cuda_the_largest_that_leaves_a_margin(monkeypatch):
    """A device of our own: 1,000 bytes, of which a sample takes 10; what is reserved for the optimizer stays free."""
    used, tried = [0], []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=1000))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: used[0])
    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments: None)

    def probe(size):
        tried.append(size)
        used[0] = 10 * size
        if used[0] > 1000:
            raise torch.OutOfMemoryError

    device = torch.device("cuda")
    assert find_micro_batch(probe, 512, device) == 64  # 128 do not fit
    assert tried[-1] == 128
    assert find_micro_batch(probe, 80, device) == 80  # 800 of the 850 that the margin leaves
    assert find_micro_batch(probe, 80, device, reserve_bytes=100) == 40
    assert find_micro_batch(probe, 512, device, agree=lambda value: max(value, used[0] > 200)) == 16  # another rank's
