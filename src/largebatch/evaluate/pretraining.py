"""Masked words and next sentences on held-out text."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from largebatch.errors import UserError
from largebatch.evaluate.inference import inference
from largebatch.train import Loss, MicroBatch
from largebatch.train.distributed import sum_over_ranks
from largebatch.train.engine import to_device


def evaluate_pretraining(
    model: torch.nn.Module,
    batches: Iterable[MicroBatch],
    loss: Loss,
    *,
    autocast: str = "fp32",
    across_ranks: bool = False,
) -> dict[str, float]:
    """Mean loss and accuracy over all masked tokens and all sequences, however they are cut into batches.

    `loss` divides its sums by the totals it is given; given totals of 1 it returns the sums, which are added in
    float64 and divided once, at the end. So every masked token weighs the same: a mean of batch means would not.

    Args:
        model: what `loss` takes; dropout is off meanwhile.
        batches: held-out micro-batches, each with ``masked_labels`` [N] and ``next_sentence_labels`` [B].
        loss: ``largebatch.models.pretraining_loss``, or another that reports mlm_loss, mlm_accuracy, nsp_loss and
            nsp_accuracy as contributions.
        autocast: "fp32", "bf16" or "fp16".
        across_ranks: every rank calls this with its own part, and all get the result over the whole.

    Returns:
        "mlm_loss" and "nsp_loss" in nats, "mlm_accuracy" and "nsp_accuracy" in [0, 1], and the counts
        "masked_tokens" and "sequences".

    Raises:
        UserError: there is not one masked token, so there is nothing to measure.
    """
    names = ("mlm_loss", "mlm_accuracy", "nsp_loss", "nsp_accuracy")
    with inference(model, autocast) as device:
        one = torch.ones((), device=device)
        totals = {"masked": one, "sequences": one}
        sums = torch.zeros(len(names), dtype=torch.float64, device=device)
        counts = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            _, metrics = loss(model, to_device(batch, device), totals)
            sums += torch.stack([metrics[name].double() for name in names])
            counts += torch.tensor([batch["masked_labels"].numel(), batch["next_sentence_labels"].numel()])
    everything = torch.cat([sums, counts.to(device)])
    if across_ranks:
        sum_over_ranks(everything)
    *values, masked, sequences = everything.tolist()
    if not masked or not sequences:
        raise UserError("the held-out text gives no training instances; hold out a larger part of the corpus")
    means = [value / count for value, count in zip(values, (masked, masked, sequences, sequences), strict=True)]
    return dict(zip(names, means, strict=True)) | {"masked_tokens": masked, "sequences": sequences}
