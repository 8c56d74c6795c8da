"""From logits to answers: the vectorised search equals the exhaustive one, and each rule of the ranking acts.

Guards: spans that start in the question, run backwards or too long, a window scoring a token it sees worse than its
neighbour, duplicates that fill the list, and results that depend on how windows are grouped.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from largebatch.evaluate import (
    SquadDataset,
    SquadFeatures,
    best_answers,
    n_best_spans,
    rank_answers,
    ranked_to_json,
    read_squad,
    squad_features,
    squad_score,
)
from largebatch.evaluate import squad_spans as module

Logits = tuple[np.ndarray, np.ndarray]


def exhaustive(start: np.ndarray, end: np.ndarray, allowed: Logits, n: int, longest: int) -> list[tuple]:
    """All valid spans of one row, best first; ties by start, then by length."""
    spans = [
        (-(start[s] + end[e]), s, e)
        for s in range(len(start))
        for e in range(s, min(s + longest, len(start)))
        if allowed[0][s] and allowed[1][e]
    ]
    return [(s, e, -score) for score, s, e in sorted(spans)[:n]]


@pytest.mark.parametrize("ties", [False, True])
def test_equals_the_exhaustive_search(ties: bool) -> None:
    """Exact equality: both add the same two fp32 numbers. Small integers as logits make ties by the hundred."""
    rng = np.random.default_rng(1)
    num_invalid = 0
    for _ in range(150):
        rows, length, n, longest = (int(rng.integers(1, high)) for high in (4, 40, 25, 12))
        start, end = (
            rng.integers(0, 4, (rows, length)).astype(np.float32) if ties else rng.normal(size=(rows, length))
            for _ in range(2)
        )
        allowed = (rng.random((rows, length)) < 0.7, rng.random((rows, length)) < 0.7)
        scores, first, last = n_best_spans(start, end, *allowed, n_best_size=n, max_answer_length=longest)
        for row in range(rows):
            expected = exhaustive(start[row], end[row], (allowed[0][row], allowed[1][row]), n, longest)
            valid = np.isfinite(scores[row])
            found = zip(first[row][valid].tolist(), last[row][valid].tolist(), scores[row][valid], strict=True)
            assert list(found) == expected
            assert not valid[len(expected) :].any()
            num_invalid += int((~valid).sum())
    assert num_invalid > 0  # rows with fewer than n spans were among them


@pytest.fixture(scope="module")
def features(extract: dict[str, SquadDataset], tokenizer: Tokenizer) -> SquadFeatures:
    """40 questions in several windows each."""
    return squad_features(
        extract["test"].examples[:40], tokenizer, max_seq_length=80, doc_stride=20, max_query_length=24
    )


def gold_logits(features: SquadFeatures, height: float = 10.0) -> Logits:
    """Logits that are `height` where the answer starts and ends, in every window that holds it, else 0."""
    start, end = np.zeros((2, len(features.token_ids)), np.float32)
    windows = np.flatnonzero(features.start_positions)
    start[features.offsets[windows] + features.start_positions[windows]] = height
    end[features.offsets[windows] + features.end_positions[windows]] = height
    return start, end


def test_the_gold_span_with_the_highest_logits_is_the_prediction(features: SquadFeatures) -> None:
    predictions = best_answers(rank_answers(features, *gold_logits(features)))
    wrong = [e.id for e in features.examples if e.answers[0].text not in predictions[e.id]]
    assert not wrong
    assert squad_score(features.examples, predictions).exact_match > 95  # "1750s" for "1750" is no exact match
    nothing = best_answers(rank_answers(features, *gold_logits(features, height=0)))
    assert squad_score(features.examples, nothing).exact_match < 10


def test_real_development_set(squad_dev: SquadDataset, dev_features: SquadFeatures) -> None:
    """With gold logits, what is lost are answers that begin or end within a token, and those above 30 tokens."""
    predictions = best_answers(rank_answers(dev_features, *gold_logits(dev_features)))
    score = squad_score(squad_dev, predictions)
    assert score.exact_match > 98
    assert score.f1 > 99
    assert score.num_missing == score.num_unknown == 0


def test_only_the_context_answers(features: SquadFeatures) -> None:
    """Huge logits on [CLS], the question and [SEP] change nothing."""
    start, end = gold_logits(features)
    plain = rank_answers(features, start, end)
    for window in range(len(features)):
        begin, stop = features.offsets[window : window + 2]
        outside = [*range(begin, begin + features.context_start[window]), stop - 1]
        start[outside] = end[outside] = 1000
    assert rank_answers(features, start, end) == plain


def test_a_start_counts_only_where_it_has_the_most_context(features: SquadFeatures) -> None:
    start, end = gold_logits(features)
    plain = rank_answers(features, start, end)
    elsewhere = ~features.max_context
    assert elsewhere[np.flatnonzero(start)].any()
    assert rank_answers(features, np.where(elsewhere, 1000, start), end) == plain
    assert rank_answers(features, np.where(elsewhere, start, 1000), end) != plain


def test_the_longest_answer_allowed(features: SquadFeatures) -> None:
    lengths = features.end_positions - features.start_positions + 1
    example = int(features.example_index[np.argmax(lengths)])
    longest, answer = int(lengths.max()), features.examples[example]
    assert longest > 5
    for allowed, equal in ((longest, True), (longest - 1, False)):
        ranked = rank_answers(features, *gold_logits(features), max_answer_length=allowed)
        assert (ranked[answer.id][0].text == answer.answers[0].text) is equal


def test_candidates_are_distinct_ranked_and_sum_to_one(features: SquadFeatures) -> None:
    start, end = np.random.default_rng(2).normal(size=(2, len(features.token_ids)))
    ranked = rank_answers(features, start, end, n_best_size=7)
    for answers in ranked.values():
        assert len(answers) == len({answer.text for answer in answers}) == 7
        scores = [answer.score for answer in answers]
        assert scores == sorted(scores, reverse=True)
        assert sum(answer.probability for answer in answers) == pytest.approx(1)
        ratio = np.exp(answers[0].score - answers[6].score)
        assert answers[0].probability / answers[6].probability == pytest.approx(ratio)
    identifier, answers = next(iter(ranked.items()))
    assert ranked_to_json(ranked)[identifier][0] == {
        "text": answers[0].text,
        "probability": answers[0].probability,
        "score": answers[0].score,
    }


def test_repeated_texts_count_once(squad_file: Callable[..., Path], tokenizer: Tokenizer) -> None:
    features = squad_features(read_squad(squad_file(("war war war", "What?", "war"))).examples, tokenizer)
    start, end = np.zeros((2, len(features.token_ids)))
    answers = rank_answers(features, start, end)["q0"]
    assert [answer.text for answer in answers] == ["war", "war war", "war war war"]


def test_grouping_windows_changes_nothing(features: SquadFeatures, monkeypatch: pytest.MonkeyPatch) -> None:
    start, end = np.random.default_rng(3).integers(0, 3, (2, len(features.token_ids))).astype(np.float32)
    together = rank_answers(features, start, end)
    monkeypatch.setattr(module, "_CELLS_PER_CHUNK", 1)
    assert rank_answers(features, start, end) == together


def test_a_context_without_tokens_gets_no_answer(squad_file: Callable[..., Path], tokenizer: Tokenizer) -> None:
    """A zero-width space is neither white space to Python nor a token to BERT."""
    features = squad_features(read_squad(squad_file(("\u200b", "What?", "\u200b"))).examples, tokenizer)
    start, end = np.zeros((2, len(features.token_ids)))
    ranked = rank_answers(features, start, end)
    assert ranked == {"q0": []}
    assert best_answers(ranked) == {"q0": ""}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"start_logits": np.zeros(3)}, "logits must have shape"),
        ({"n_best_size": 0}, "must be >= 1, got 0 and 30"),
        ({"max_answer_length": 0}, "must be >= 1, got 20 and 0"),
        ({"end_logits": "nan"}, "the model has diverged"),
    ],
)
def test_wrong_arguments(features: SquadFeatures, change: dict, expected: str) -> None:
    start, end = gold_logits(features)
    if isinstance(change.get("end_logits"), str):
        change = {"end_logits": np.full_like(end, np.nan)}
    with pytest.raises(ValueError, match=expected):
        rank_answers(features, **({"start_logits": start, "end_logits": end} | change))
