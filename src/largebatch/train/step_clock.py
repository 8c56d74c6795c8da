"""Where a step's time goes: waiting for data, forward, backward, reduction, optimizer."""

import time

import torch

PARTS = ("data", "forward", "backward", "reduction", "optimizer")


class StepClock:
    """Adds up the seconds of each part of a step.

    On CUDA the parts are told apart by waiting for the device at each mark, which keeps the host from running ahead:
    a percent or a few of a step.

    Args:
        device: what the step runs on.
        on: whether to tell the parts apart; without, only `total_s` and the wait for data are known.

    Attributes:
        parts_s: seconds by the names in `PARTS`; empty if not ``on``.
    """

    def __init__(self, device: torch.device, on: bool) -> None:
        self._device, self._on = device, on
        self._start = self._last = time.perf_counter()
        self.parts_s: dict[str, float] = dict.fromkeys(PARTS, 0.0) if on else {}

    def mark(self, part: str) -> float:
        """Say that what has happened since the last mark was ``part``; return its seconds."""
        if self._on and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        took, self._last = now - self._last, now
        if self._on:
            self.parts_s[part] += took
        return took

    def total_s(self) -> float:
        """Return the seconds since the clock was made."""
        return time.perf_counter() - self._start
