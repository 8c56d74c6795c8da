"""SQuAD v1.1 from a model to a score: logits for every window, an answer for every question, EM and F1."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from largebatch.evaluate.inference import inference
from largebatch.evaluate.squad_data import SquadDataset
from largebatch.evaluate.squad_features import SquadFeatures, squad_features
from largebatch.evaluate.squad_metrics import SquadScore, squad_score
from largebatch.evaluate.squad_spans import best_answers, rank_answers
from largebatch.train import distributed

if TYPE_CHECKING:
    from collections.abc import Callable

    from tokenizers import Tokenizer


def predict(
    model: torch.nn.Module,
    features: SquadFeatures,
    *,
    batch_size: int = 32,
    autocast: str = "fp32",
    across_ranks: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Start and end logits of every token of every window, without gradients and dropout.

    Windows are sorted by length, longest first: little padding, and the most memory is needed at once, not late.

    Args:
        model: called as ``model(input_ids, token_type_ids, attention_mask)``, returns start and end logits
            [B, L]. It runs where its parameters are and is left in the mode (training or not) it came in.
        features: the windows, from ``squad_features``.
        batch_size: windows in a forward pass. It changes speed and memory, not the result.
        autocast: "fp32", "bf16" or "fp16".
        across_ranks: every rank calls this with the same features, runs its share, and gets all logits.
        progress: called with (windows done, windows in all), both of this rank, after each pass.

    Returns:
        start_logits and end_logits, [T] float32 each, for the tokens of ``features.token_ids``.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    order = np.argsort(-features.lengths, kind="stable")
    if across_ranks:
        order = order[distributed.rank() :: distributed.world_size()]
    logits = np.zeros((2, len(features.token_ids)), np.float32)
    with inference(model, autocast) as device:
        for begin in range(0, len(order), batch_size):
            windows = order[begin : begin + batch_size]
            batch = features.batch(windows)
            inputs = (batch[name].to(device) for name in ("input_ids", "token_type_ids", "attention_mask"))
            both = torch.stack(list(model(*inputs))).float().cpu().numpy()  # [2, B, L]
            flat = np.concatenate([np.arange(features.offsets[w], features.offsets[w + 1]) for w in windows])
            logits[:, flat] = both[:, batch["attention_mask"].numpy()]
            if progress is not None:
                progress(begin + len(windows), len(order))
    if across_ranks:
        # Each token is another rank's zero.
        logits = distributed.sum_over_ranks(torch.from_numpy(logits).to(device)).cpu().numpy()
    return logits[0], logits[1]


def answer_questions(
    model: torch.nn.Module,
    features: SquadFeatures,
    *,
    batch_size: int = 32,
    n_best_size: int = 20,
    max_answer_length: int = 30,
) -> dict[str, str]:
    """Predictions for every question of `features`: id -> text. See ``predict`` and ``rank_answers``."""
    start_logits, end_logits = predict(model, features, batch_size=batch_size)
    ranked = rank_answers(
        features, start_logits, end_logits, n_best_size=n_best_size, max_answer_length=max_answer_length
    )
    return best_answers(ranked)


def evaluate_squad(
    model: torch.nn.Module,
    dataset: SquadDataset,
    tokenizer: Tokenizer,
    *,
    max_seq_length: int = 384,
    doc_stride: int = 128,
    max_query_length: int = 64,
    batch_size: int = 32,
) -> tuple[SquadScore, dict[str, str]]:
    """Answer all questions of a file and score them: the whole of SQuAD evaluation in one call.

    To score a model again and again (``evaluate`` of the engine), make the features once and call
    ``answer_questions`` and ``squad_score``.

    Returns:
        the score, and the predictions that made it.

    Example:
        >>> dataset = read_squad("dev-v1.1.json", on_bad_answer="skip")  # doctest: +SKIP
        >>> score, predictions = evaluate_squad(model, dataset, tokenizer)  # doctest: +SKIP
        >>> print(score)  # doctest: +SKIP
    """
    features = squad_features(
        dataset.examples,
        tokenizer,
        max_seq_length=max_seq_length,
        doc_stride=doc_stride,
        max_query_length=max_query_length,
    )
    predictions = answer_questions(model, features, batch_size=batch_size)
    return squad_score(dataset, predictions), predictions
