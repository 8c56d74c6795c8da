"""Accuracy of a classifier."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from largebatch.errors import UserError
from largebatch.evaluate.inference import inference
from largebatch.train import Loss, MicroBatch
from largebatch.train.distributed import sum_over_ranks
from largebatch.train.engine import to_device


@runtime_checkable
class LabelledImages(Protocol):
    """What an image data set must have: images as the model takes them, and their classes."""

    images: Tensor  # [N, C, H, W] float
    labels: Tensor  # [N] int64


def evaluate_classification(
    model: torch.nn.Module,
    data: LabelledImages | tuple[Tensor, Tensor] | Iterable[MicroBatch],
    loss: Loss,
    *,
    batch_size: int = 512,
    autocast: str = "fp32",
    across_ranks: bool = False,
) -> dict[str, float]:
    """Mean loss and accuracy over all samples, however they are cut into batches.

    Args:
        model: what `loss` takes; dropout and the like are off meanwhile.
        data: an object with ``images`` and ``labels``, the two tensors as a pair, or micro-batches with ``labels``
            [B], which may be of unequal size.
        loss: ``largebatch.models.classification_loss``, or another that reports accuracy as a contribution.
        batch_size: samples in a forward pass, where `data` is not cut into micro-batches already.
        autocast: "fp32", "bf16" or "fp16".
        across_ranks: every rank calls this with its own part, and all get the result over the whole.

    Returns:
        "loss" in nats, "accuracy" in [0, 1], and the count "samples".

    Raises:
        ValueError: `batch_size` below 1, or images and labels of unequal number.
        UserError: there are no samples.
    """
    with inference(model, autocast) as device:
        totals = {"sequences": torch.ones((), device=device)}
        sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, right answers, samples
        for batch in _micro_batches(data, batch_size):
            value, metrics = loss(model, to_device(batch, device), totals)
            count = torch.tensor(float(batch["labels"].numel()), device=device)
            sums += torch.stack([value.double(), metrics["accuracy"].double(), count.double()])
    if across_ranks:
        sum_over_ranks(sums)
    loss_sum, correct, samples = sums.tolist()
    if not samples:
        raise UserError("there are no samples to evaluate; check the test set's path")
    return {"loss": loss_sum / samples, "accuracy": correct / samples, "samples": samples}


def _micro_batches(
    data: LabelledImages | tuple[Tensor, Tensor] | Iterable[MicroBatch], batch_size: int
) -> Iterator[MicroBatch]:
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor):
        images, labels = data
    elif isinstance(data, LabelledImages):
        images, labels = data.images, data.labels
    else:
        yield from data
        return
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    if len(images) != len(labels):
        raise ValueError(f"there must be one label for each image, got {len(images)} images and {len(labels)} labels")
    for begin in range(0, len(images), batch_size):
        yield {"images": images[begin : begin + batch_size], "labels": labels[begin : begin + batch_size]}
