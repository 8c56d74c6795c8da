"""Losses as contributions: sums over a micro-batch divided by the totals of the whole global batch.

Adding the contributions (and their gradients) of all micro-batches of all ranks gives the mean over the global batch,
however it was cut up. A micro-batch may have none of the things that are counted: it contributes 0.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MicroBatch = Mapping[str, Tensor]
Totals = Mapping[str, Tensor]
_SEQUENCES = ("input_ids", "token_type_ids", "attention_mask")


def pretraining_loss(model: nn.Module, micro_batch: MicroBatch, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
    """Return this micro-batch's share of the masked-language-model loss plus the next-sentence loss.

    The global loss is the mean cross-entropy over all masked tokens plus the mean cross-entropy over all sequences
    (Devlin et al., 2019, appendix A.2).

    Args:
        model: called with ``input_ids, token_type_ids, attention_mask`` [B, L] and ``masked_positions`` [N].
        micro_batch: those four, ``masked_labels`` [N] and ``next_sentence_labels`` [B] (1: random next); and
            ``dropout_keys`` [B] to have the masks a function of.
        totals: "masked" and "sequences" of the global batch, over all ranks.

    Returns:
        The loss contribution, and the contributions to mlm_loss, mlm_accuracy, nsp_loss and nsp_accuracy (detached).
    """
    names = (*_SEQUENCES, "masked_positions")
    if getattr(getattr(model, "module", model), "takes_labels", False):  # DDP keeps the model it wraps in `module`
        sums, nsp_logits = _forward(model, micro_batch, *names, masked_labels=micro_batch["masked_labels"])
        mlm_loss, mlm_accuracy = (part / _at_least_one(totals["masked"], part) for part in sums)
    else:
        mlm_logits, nsp_logits = _forward(model, micro_batch, *names)
        mlm_loss, mlm_accuracy = _contribution(mlm_logits, micro_batch["masked_labels"], totals["masked"])
    nsp_loss, nsp_accuracy = _contribution(nsp_logits, micro_batch["next_sentence_labels"], totals["sequences"])
    metrics = {
        "mlm_loss": mlm_loss.detach(),
        "mlm_accuracy": mlm_accuracy,
        "nsp_loss": nsp_loss.detach(),
        "nsp_accuracy": nsp_accuracy,
    }
    return mlm_loss + nsp_loss, metrics


def question_answering_loss(
    model: nn.Module, micro_batch: MicroBatch, totals: Totals
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return this micro-batch's share of the span loss: the mean of the start's and the end's cross-entropy.

    A position outside [0, L), which says that the window does not hold the answer, becomes 0, the [CLS] token, as in
    the original BERT. Padding takes no part in the softmax.

    Args:
        model: called with ``input_ids, token_type_ids, attention_mask`` [B, L]; returns two [B, L] of logits.
        micro_batch: those three, ``start_positions`` [B] and ``end_positions`` [B]; and ``dropout_keys`` [B] to have
            the masks a function of.
        totals: "sequences" of the global batch, over all ranks.

    Returns:
        The loss contribution, and the contributions to start_accuracy and end_accuracy (detached).
    """
    logits = _forward(model, micro_batch, *_SEQUENCES)
    parts = {}
    for name, side in zip(("start", "end"), logits, strict=True):
        positions = micro_batch[f"{name}_positions"]
        inside = (positions >= 0) & (positions < side.shape[1])
        parts[name] = _contribution(side, torch.where(inside, positions, 0), totals["sequences"])
    loss = (parts["start"][0] + parts["end"][0]) / 2
    return loss, {f"{name}_accuracy": accuracy for name, (_, accuracy) in parts.items()}


def classification_loss(model: nn.Module, micro_batch: MicroBatch, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
    """Return this micro-batch's share of the mean cross-entropy over sequences or images.

    Args:
        model: called with ``images`` where the micro-batch has them, else with ``input_ids``, ``token_type_ids`` and
            ``attention_mask``; returns class logits [B, C].
        micro_batch: those, and ``labels`` [B]; and ``dropout_keys`` [B] to have the masks a function of.
        totals: "sequences" of the global batch, over all ranks.

    Returns:
        The loss contribution, and the contribution to accuracy (detached).
    """
    logits = _forward(model, micro_batch, *(("images",) if "images" in micro_batch else _SEQUENCES))
    loss, accuracy = _contribution(logits, micro_batch["labels"], totals["sequences"])
    return loss, {"accuracy": accuracy}


def _forward(model: nn.Module, micro_batch: MicroBatch, *names: str, **more: Tensor) -> Any:
    keys = {name: micro_batch[name] for name in ("dropout_keys",) if name in micro_batch}
    return model(*(micro_batch[name] for name in names), **keys, **more)


def _at_least_one(total: Tensor, like: Tensor) -> Tensor:
    return torch.as_tensor(total, device=like.device).clamp(min=1)


def _contribution(logits: Tensor, labels: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy and the number of right answers, both over the global total."""
    total = _at_least_one(total, logits)
    logits = logits.float()
    loss = F.cross_entropy(logits, labels, reduction="sum") / total
    correct = (logits.detach().argmax(-1) == labels).sum() / total
    return loss, correct
