"""What the runner needs to know of a kind of run; one class per kind fulfils it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from largebatch.errors import UserError
from largebatch.experiments.config import RunConfig
from largebatch.train import GlobalBatch, MicroBatch


class Workload(Protocol):
    """A model, its data and its loss.

    Attributes:
        config: the configuration, with what depends on the data filled in.
        micro_batch_sizes: of each stage; the runner fills it in before it asks for batches.
        details: what the configuration does not say, such as the resolved model, for the run's `config.json`.
        baselines: figures to read the evaluation against, by name.
        notes: what a reader of the figures must know.
    """

    config: RunConfig
    micro_batch_sizes: list[int]
    details: dict[str, Any]
    baselines: dict[str, float]
    notes: list[str]

    def model(self) -> nn.Module:
        """A fresh model; the random state is seeded by the caller."""

    def batches(self, stage: int, cursor: Mapping[str, int] | None) -> Iterator[GlobalBatch]:
        """This rank's part of each global batch of a stage, from the cursor on."""

    def loss(
        self, model: nn.Module, micro_batch: MicroBatch, totals: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """This micro-batch's contribution to the mean loss and metrics of the global batch."""

    def probe_batch(self, stage: int, size: int) -> MicroBatch:
        """A micro-batch of `size` samples that takes as much memory as any can."""

    def evaluate(self, model: nn.Module, stage: int, run: Path | None) -> dict[str, Any]:
        """Figures on held-out data: all that belongs into an `eval` line, `split` included."""

    def save_assets(self, run: Path) -> None:
        """Copy into a run directory what its model needs to be used elsewhere, such as the tokenizer."""


def check_range(settings: Any, where: str, **ranges: tuple[float, float]) -> None:
    """Refuse settings outside their ranges, both ends of which are inside; one that is None is left to its default.

    Args:
        settings: holds them by name.
        where: what the command line puts before the names, such as "data.".
        ranges: the least and the largest value of each.

    Raises:
        UserError: one is outside.
    """
    for name, (least, largest) in ranges.items():
        value = getattr(settings, name)
        if value is not None and not least <= value <= largest:
            bounds = f"at least {least}" if largest == math.inf else f"in {least} to {largest}"
            raise UserError(f"{where}{name} is {value}; it must be {bounds}")


def rank_share(batch_size: int, rank: int, world_size: int) -> slice:
    """The part of a global batch that a rank computes."""
    size = batch_size // world_size
    return slice(rank * size, (rank + 1) * size)


def pack(lengths: NDArray[np.integer[Any]], room: int) -> list[int]:
    """Return how many sequences go into each micro-batch, of as few as there can be, about equally full if that fits.

    Args:
        lengths: tokens of each sequence, at most `room`; they keep their order.
        room: tokens.
    """
    ends = np.cumsum(lengths)
    stops = [0]
    while stops[-1] < len(lengths):
        full = room + (ends[stops[-1] - 1] if stops[-1] else 0)
        stops.append(int(np.searchsorted(ends, full, side="right")))
    number = len(stops) - 1
    even = [0, *np.searchsorted(ends, ends[-1] * np.arange(1, number) / number, side="right").tolist(), len(lengths)]
    for choice in (even, stops):
        sizes = np.diff(choice)
        if all(0 < part.sum() <= room for part in np.split(lengths, choice[1:-1])):
            break
    return [int(size) for size in sizes]


def cut(samples: Sequence[Any], size: int) -> Iterator[Any]:
    """Cut samples into micro-batches of `size`."""
    for start in range(0, len(samples), size):
        yield samples[start : start + size]
