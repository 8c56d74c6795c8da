"""Fine-tuning on SQuAD: the batches that the engine trains on, and the published settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from largebatch.data.sampling import SampleStream, dropout_keys
from largebatch.errors import UserError
from largebatch.evaluate.squad_features import SquadFeatures
from largebatch.train import Batches, GlobalBatch, distributed


@dataclass(frozen=True)
class FinetuneSettings:
    """How long and how fast to fine-tune; the defaults are Devlin et al.'s for SQuAD v1.1.

    Attributes:
        optimizer: "adamw" or "lamb".
        learning_rate: the peak, reached at the end of the warm-up; it then falls to 0 linearly. Devlin et al.
            chose among 3e-5, 4e-5 and 5e-5.
        batch_size: windows in a global batch.
        epochs: passes over the training windows, 2 to 3.
        warmup: share of the steps in which the rate rises linearly from 0.
        weight_decay: of all but biases and LayerNorms.

    Source: Devlin et al. 2019, section 4.2 and appendix A.3; You et al. 2020 (LAMB), section 4.1.
    """

    optimizer: str = "adamw"
    learning_rate: float = 3e-5
    batch_size: int = 32
    epochs: float = 2.0
    warmup: float = 0.1
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        if self.optimizer not in ("adamw", "lamb"):
            raise ValueError(f"optimizer must be 'adamw' or 'lamb', got {self.optimizer!r}")
        for name in ("learning_rate", "batch_size", "epochs"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be in [0, 1), got {self.warmup}")

    @classmethod
    def lamb(cls) -> FinetuneSettings:
        """LAMB in AdamW's place: the LAMB authors' code names 3e-4, 4e-4 and 5e-4 at batch 64."""
        return cls(optimizer="lamb", learning_rate=3e-4, batch_size=64)

    def steps(self, num_windows: int) -> int:
        """Optimizer steps for `num_windows` training windows, at least 1."""
        return max(1, round(self.epochs * num_windows / self.batch_size))

    def warmup_steps(self, num_windows: int) -> int:
        """How many of these steps are warm-up."""
        return round(self.warmup * self.steps(num_windows))


def squad_batches(
    features: SquadFeatures,
    *,
    batch_size: int | Sequence[int] = 32,
    micro_batch_size: int | None = None,
    seed: int = 0,
    flops: Callable[[np.ndarray], float] | None = None,
    keyed_dropout: bool = False,
) -> Batches:
    """The engine's batches: global batches of windows, shuffled anew in each epoch.

    1. The order of an epoch is a function of (seed, epoch); batches run on across the end of an epoch.
    2. A global batch is sorted by length and dealt to the ranks in turn, so that all have the same work.
    3. Each rank cuts its part into micro-batches of windows of like length, each padded to its own longest.

    Sorting within the global batch and no further leaves each batch a fair sample. Windows of questions without a
    usable answer (``trainable`` is False) take no part.

    Args:
        features: the windows, from ``squad_features``.
        batch_size: windows in a global batch, over all ranks; a sequence gives one number for each stage.
        micro_batch_size: windows in a forward pass of one rank; None takes the rank's whole part at once. It changes
            speed and memory, not the gradient.
        seed: of the shuffles.
        flops: window lengths of this rank's part -> FLOPs of their forward and backward pass, e.g.
            ``lambda lengths: training_flops(config, lengths, 0)``; None reports 0.
        keyed_dropout: make the dropout masks functions of epoch and window, whatever the ranks and micro-batches.

    Returns:
        ``batches(stage_index, cursor)``, which yields ``GlobalBatch`` without end; its micro-batches are what
        ``question_answering_loss`` takes, its totals hold "sequences", and its cursor is {"epoch", "position"}.

    Raises:
        ValueError: a batch size below the number of ranks, or a micro-batch size below 1.
        UserError: no window can be trained on.
    """
    sizes = [batch_size] if isinstance(batch_size, int) else list(batch_size)
    rank, world_size = distributed.rank(), distributed.world_size()
    if not sizes or min(sizes) < world_size:
        raise ValueError(f"batch_size must be at least the number of ranks ({world_size}), got {batch_size}")
    if micro_batch_size is not None and micro_batch_size < 1:
        raise ValueError(f"micro_batch_size must be >= 1, got {micro_batch_size}")
    windows = np.flatnonzero(features.trainable)
    if not len(windows):
        raise UserError("no question has an answer at its offset, so there is nothing to train on; check the file")
    stream = SampleStream(lambda epoch: len(windows), seed)

    def batches(stage: int, cursor: Mapping[str, int] | None) -> Iterator[GlobalBatch]:
        size = sizes[0] if isinstance(batch_size, int) else sizes[stage]
        position = dict(cursor) if cursor else None
        while True:
            pieces, position = stream.take(position, size)
            chosen = windows[np.concatenate([indices for _, indices in pieces])]
            keys = np.concatenate([dropout_keys(seed, epoch, indices) for epoch, indices in pieces])
            lengths = features.offsets[chosen + 1] - features.offsets[chosen]
            share = np.argsort(lengths, kind="stable")[rank::world_size]
            mine, keys, lengths = chosen[share], keys[share], lengths[share]
            step = micro_batch_size or len(mine)
            micro_batches = []
            for part in (slice(begin, begin + step) for begin in range(0, len(mine), step)):
                micro_batches.append(features.batch(mine[part]))
                if keyed_dropout:
                    micro_batches[-1]["dropout_keys"] = torch.from_numpy(keys[part])
            yield GlobalBatch(
                micro_batches=micro_batches,
                totals={"sequences": len(mine)},
                num_sequences=len(mine),
                num_tokens=int(lengths.sum()),
                flops=float(flops(lengths)) if flops is not None else 0.0,
                cursor=dict(position),
            )

    return batches
