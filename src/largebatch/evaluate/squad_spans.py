"""From start and end logits to answers: the best spans of each window, the best texts of each question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from largebatch.evaluate.squad_features import SquadFeatures

_CELLS_PER_CHUNK = 1 << 21  # windows x positions x span lengths held at once: 8 MB of scores


@dataclass(frozen=True, slots=True)
class RankedAnswer:
    """One candidate text for a question."""

    text: str
    probability: float  # softmax of the scores of the candidates kept for this question
    score: float  # start logit + end logit


def n_best_spans(
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    start_allowed: np.ndarray,
    end_allowed: np.ndarray,
    *,
    n_best_size: int = 20,
    max_answer_length: int = 30,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The spans with the highest start logit + end logit in each row, exactly.

    A span begins at an allowed start, ends at an allowed end no earlier, and has at most `max_answer_length`
    tokens. Ties go to the earlier start, then to the shorter span.

    1. Every start is paired with its best end.
    2. The `n_best_size` best of these starts are kept: a span of any other start is preceded by one of each.
    3. Their at most n_best_size x max_answer_length spans are sorted.

    The script published with BERT pairs the 20 best starts with the 20 best ends and then drops the invalid
    pairs; it agrees except where invalid pairs use up its twenty.

    Args:
        start_logits, end_logits: [B, L] float, finite where allowed.
        start_allowed, end_allowed: [B, L] bool.

    Returns:
        scores [B, n] in falling order, starts [B, n] and ends [B, n], n <= n_best_size; a score of -inf marks
        a place for which there is no span.
    """
    num_rows, length = start_logits.shape
    width = min(max_answer_length, max(length, 1))
    starts = np.where(start_allowed, start_logits, -np.inf)
    ends = np.full((num_rows, length + width - 1), -np.inf, dtype=end_logits.dtype)
    ends[:, :length] = np.where(end_allowed, end_logits, -np.inf)
    ends_from = np.lib.stride_tricks.sliding_window_view(ends, width, axis=1)  # [B, L, width], a view

    best = starts + ends_from.max(axis=2)
    kept = np.argsort(-best, axis=1, kind="stable")[:, :n_best_size]
    kept.sort(axis=1)  # so that the next stable sort settles ties by start
    rows = np.arange(num_rows)[:, None]
    scores = starts[rows, kept][:, :, None] + ends_from[rows, kept]
    scores = scores.reshape(num_rows, -1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :n_best_size]
    first = kept[rows, order // width]
    return scores[rows, order], first, first + order % width


def rank_answers(
    features: SquadFeatures,
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    *,
    n_best_size: int = 20,
    max_answer_length: int = 30,
) -> dict[str, list[RankedAnswer]]:
    """The best distinct answer texts of every question, over all its windows, best first.

    Only context tokens take part, and a start counts only in the window where it has the most context. Texts are
    cut out of the original context by character, so case, accents and spacing are the original's.

    Args:
        features: the windows, from ``squad_features``.
        start_logits, end_logits: [T] float, one for each token of ``features.token_ids``.
        n_best_size: spans kept of each window, and texts kept of each question.
        max_answer_length: longest span, in tokens.

    Returns:
        question id -> candidates; an empty list where the context has no tokens.

    Raises:
        ValueError: a wrong shape, a setting below 1, or logits that are not finite.
    """
    shape = features.token_ids.shape
    if start_logits.shape != shape or end_logits.shape != shape:
        raise ValueError(f"logits must have shape {shape}, got {start_logits.shape} and {end_logits.shape}")
    if n_best_size < 1 or max_answer_length < 1:
        raise ValueError(f"n_best_size and max_answer_length must be >= 1, got {n_best_size} and {max_answer_length}")
    if not (np.isfinite(start_logits).all() and np.isfinite(end_logits).all()):
        raise ValueError("start and end logits must be finite: the model has diverged")

    spans: list[list[tuple[float, int, int, int]]] = [[] for _ in features.examples]  # -score, window, start, end
    for windows in _chunks(features, max_answer_length):
        padded = _padded(features, windows, start_logits, end_logits)
        scores, starts, ends = n_best_spans(*padded, n_best_size=n_best_size, max_answer_length=max_answer_length)
        row, place = np.nonzero(np.isfinite(scores))
        owner = features.example_index[windows[row]].tolist()
        columns = (-scores[row, place], windows[row], starts[row, place], ends[row, place])
        for example, *span in zip(owner, *(column.tolist() for column in columns), strict=True):
            spans[example].append(tuple(span))
    return {
        example.id: _ranked(features, found, n_best_size)
        for example, found in zip(features.examples, spans, strict=True)
    }


def best_answers(ranked: dict[str, list[RankedAnswer]]) -> dict[str, str]:
    """Predictions as the official script takes them: question id -> text of the best candidate, or ""."""
    return {identifier: answers[0].text if answers else "" for identifier, answers in ranked.items()}


def ranked_to_json(ranked: dict[str, list[RankedAnswer]]) -> dict[str, list[dict[str, object]]]:
    """All candidates in plain types, for a file beside the predictions."""
    return {identifier: [asdict(answer) for answer in answers] for identifier, answers in ranked.items()}


def _chunks(features: SquadFeatures, max_answer_length: int) -> Iterator[np.ndarray]:
    """All windows, those of like length together, in groups of bounded memory."""
    order = np.argsort(-features.lengths, kind="stable")
    begin = 0
    while begin < len(order):
        cells = int(features.lengths[order[begin]]) * max_answer_length
        size = max(1, _CELLS_PER_CHUNK // cells)
        yield order[begin : begin + size]
        begin += size


def _padded(
    features: SquadFeatures, windows: np.ndarray, start_logits: np.ndarray, end_logits: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Logits of some windows [B, L], and where a span may start and end."""
    begins, lengths = features.offsets[windows], features.lengths[windows]
    positions = np.arange(lengths.max())
    in_context = (positions >= features.context_start[windows][:, None]) & (positions < (lengths - 1)[:, None])
    flat = np.where(positions < lengths[:, None], begins[:, None] + positions, 0)
    return start_logits[flat], end_logits[flat], in_context & features.max_context[flat], in_context


def _ranked(
    features: SquadFeatures, spans: Sequence[tuple[float, int, int, int]], n_best_size: int
) -> list[RankedAnswer]:
    scores: dict[str, float] = {}
    for negative, window, start, end in sorted(spans):
        if len(scores) == n_best_size:
            break
        scores.setdefault(features.text(window, start, end), -negative)
    values = np.array(list(scores.values()), dtype=np.float64)
    weights = np.exp(values - values.max(initial=-np.inf))
    return [
        RankedAnswer(text, float(weight), score)
        for (text, score), weight in zip(scores.items(), weights / weights.sum(), strict=True)
    ]
