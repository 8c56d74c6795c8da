"""EM and F1 against two implementations by other hands, on the real development set, with predictions made to hurt.

Guards: the order of the normalisation steps, word boundaries beside non-ASCII characters, the maximum over gold
answers taken for EM and F1 apart, and the divisor (all questions, not all predictions).
"""

import json
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import pytest

from largebatch.errors import UserError
from largebatch.evaluate import (
    SquadDataset,
    SquadExample,
    answer_scores,
    normalize_answer,
    read_predictions,
    read_squad,
    squad_score,
    write_predictions,
)

PUNCTUATION = r"""!"#$%&'()*+,-./:;<=>?@[\]^_`{|}~"""

ADVERSARIAL: dict[str, Callable[[SquadExample], str]] = {
    "gold": lambda e: e.gold_texts[0],
    "last gold": lambda e: e.gold_texts[-1],
    "empty": lambda e: "",
    "blank": lambda e: " \t\n\u00a0\u3000",
    "article": lambda e: "the",
    "articles only": lambda e: "a An THE",
    "punctuation only": lambda e: PUNCTUATION,
    "no overlap": lambda e: "xyzzy plugh",
    "shifted right": lambda e: e.context[(s := e.context.index(e.gold_texts[0]) + 3) : s + len(e.gold_texts[0])],
    "shifted left": lambda e: e.context[max(0, (s := e.context.index(e.gold_texts[0])) - 9) : s + 4],
    "whole context": lambda e: e.context,
    "question": lambda e: e.question,
    "upper case": lambda e: e.gold_texts[0].upper(),  # ß becomes SS, which does not come back
    "articles inserted": lambda e: "the " + " a ".join(e.gold_texts[0].split()),
    "articles joined by hyphens": lambda e: "the-" + e.gold_texts[0],
    "articles in curly quotes": lambda e: f"“the” {e.gold_texts[0]} ‘an’",
    "punctuation inserted": lambda e: "".join(c + PUNCTUATION[i % 32] for i, c in enumerate(e.gold_texts[0])),
    "words twice": lambda e: f"{e.gold_texts[0]} {e.gold_texts[0]}",
    "words backwards": lambda e: " ".join(reversed(e.gold_texts[0].split())),
    "wide spaces": lambda e: e.gold_texts[0].replace(" ", "\u2003\u00a0\u2028"),
    "zero-width spaces": lambda e: e.gold_texts[0].replace(" ", "\u200b"),
    "non-ASCII dashes": lambda e: e.gold_texts[0].replace("-", "—").replace(" ", "–"),
    "full-width": lambda e: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in e.gold_texts[0]),
    "dotted capital I": lambda e: e.gold_texts[0].replace("i", "İ"),
    "combining accents": lambda e: e.gold_texts[0].replace("a", "a\u0301"),
    "emoji": lambda e: f"{e.gold_texts[0]} 😀 a😀the",
}


def adversarial_predictions(examples: Sequence[SquadExample]) -> dict[str, str]:
    """Each question gets one of the kinds in turn; their number, 26, divides neither articles nor paragraphs."""
    kinds = list(ADVERSARIAL.values())
    return {example.id: kinds[index % len(kinds)](example) for index, example in enumerate(examples)}


def slow_normalize(text: str) -> str:
    """Transcribed from the definition in the SQuAD paper, section 6.1, by hand: no regular expression, no translate."""
    kept = [character for character in text.lower() if character not in PUNCTUATION]
    runs: list[str] = []  # maximal runs of word characters, and of others
    for character in kept:
        if runs and runs[-1][-1].isalnum() == character.isalnum():
            runs[-1] += character
        else:
            runs.append(character)
    return " ".join("".join(" " if run in ("a", "an", "the") else run for run in runs).split())


def slow_scores(prediction: str, gold_texts: Sequence[str]) -> tuple[Fraction, Fraction]:
    """Exact match and F1 by the definition, in exact arithmetic."""
    best_em = best_f1 = Fraction(0)
    for gold in gold_texts:
        predicted_words, gold_words = slow_normalize(prediction).split(), slow_normalize(gold).split()
        if slow_normalize(prediction) == slow_normalize(gold):
            best_em = Fraction(1)
        remaining, shared = list(gold_words), 0
        for word in predicted_words:
            if word in remaining:
                remaining.remove(word)
                shared += 1
        if shared:
            precision, recall = Fraction(shared, len(predicted_words)), Fraction(shared, len(gold_words))
            best_f1 = max(best_f1, 2 * precision * recall / (precision + recall))
    return best_em, best_f1


def test_equals_the_definition_on_the_real_development_set(squad_dev: SquadDataset) -> None:
    """1e-9: F1 here is rounded once (2**-53), the sum over 10,565 of them at most 10,565 times (1.2e-12 relative)."""
    predictions = adversarial_predictions(squad_dev.examples)
    score = squad_score(squad_dev, predictions)
    slow = [slow_scores(predictions[example.id], example.gold_texts) for example in squad_dev]
    assert score.exact_match == pytest.approx(float(100 * sum(em for em, _ in slow) / len(slow)), rel=1e-9)
    assert score.f1 == pytest.approx(float(100 * sum(f1 for _, f1 in slow) / len(slow)), rel=1e-9)
    # The predictions are neither all right nor all wrong, and EM and F1 are different things.
    assert 10 < score.exact_match < score.f1 - 5 < 90
    for example, (em, f1) in zip(squad_dev, slow, strict=True):
        ours = answer_scores(predictions[example.id], example.gold_texts)
        assert ours == (float(em), pytest.approx(float(f1), rel=1e-15)), example.id


def test_equals_torchmetrics_on_the_real_development_set(squad_dev: SquadDataset) -> None:
    """torchmetrics sums in fp32, so 26 questions at a time: 2**-24 for each of 26 sums and 4 operations, 2e-6.

    Where both texts normalise to nothing it gives F1 1, as the script of v2.0 does, and that of v1.1 gives 0: no gold
    answer of the development set does so (see test_scores for the case).
    """
    torchmetrics_squad = pytest.importorskip("torchmetrics.functional.text").squad
    examples = squad_dev.examples
    assert all(normalize_answer(text) for example in examples for text in example.gold_texts)
    predictions = adversarial_predictions(examples)
    for begin in range(0, len(examples), 26):
        chunk = examples[begin : begin + 26]
        theirs = torchmetrics_squad(
            [{"id": e.id, "prediction_text": predictions[e.id]} for e in chunk],
            [
                {"id": e.id, "answers": {"text": list(e.gold_texts), "answer_start": [0] * len(e.answers)}}
                for e in chunk
            ],
        )
        ours = squad_score(chunk, {e.id: predictions[e.id] for e in chunk})
        assert ours.exact_match == pytest.approx(float(theirs["exact_match"]), rel=2e-6), chunk[0].id
        assert ours.f1 == pytest.approx(float(theirs["f1"]), rel=2e-6), chunk[0].id


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Rhine,\tin\nEurope.", "rhine in europe"),
        ("A.D.", "ad"),  # punctuation goes before articles: "a" is no word of its own here
        ("the-Rhine", "therhine"),
        ("“the” Rhine", "“ ” rhine"),  # only ASCII punctuation goes, and “ is no letter
        ("an–apple", "–apple"),
        ("theatre banana", "theatre banana"),
        ("A AN tHe", ""),
        ("a\u0301 la", "\u0301 la"),  # a combining accent is no word character
        ("ÉCOLE", "école"),
        ("$1,230_000", "1230000"),
    ],
)
def test_normalisation(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected
    assert slow_normalize(text) == expected


@pytest.mark.parametrize(
    ("prediction", "gold", "em", "f1"),
    [
        ("the cat sat", ["cat sat"], 1, 1),
        ("cat", ["cat sat"], 0, 2 / 3),
        ("cat cat", ["cat sat"], 0, 1 / 2),  # a bag: the second cat finds no partner
        ("dog", ["cat", "dog"], 1, 1),
        ("cat sat", ["cat", "the dog"], 0, 2 / 3),
        ("", ["cat"], 0, 0),
        ("the", ["a"], 1, 0),  # both are nothing: so does the v1.1 script score it
        ("...", [""], 1, 0),
    ],
)
def test_scores(prediction: str, gold: list[str], em: float, f1: float) -> None:
    assert answer_scores(prediction, gold) == (em, pytest.approx(f1))


def test_missing_and_unknown_predictions_are_counted_and_said(extract: dict[str, SquadDataset]) -> None:
    examples = extract["test"].examples[:10]
    predictions = {example.id: example.gold_texts[0] for example in examples}
    assert squad_score(examples, predictions).metrics() == {"exact_match": 100, "f1": 100, "f1_error": 0}
    assert str(squad_score(examples, predictions)) == "exact match 100.00%, F1 100.00% (± 0.00) over 10 questions"
    for example in examples[:3]:
        del predictions[example.id]
    predictions |= {"nobody": "x", "asked": "y"}
    score = squad_score(examples, predictions)
    assert (score.num_questions, score.num_missing, score.num_unknown) == (10, 3, 2)
    assert score.exact_match == score.f1 == pytest.approx(70)
    assert score.f1_error == pytest.approx(100 * (0.7 * 0.3 / 10) ** 0.5)
    assert str(score) == (
        "exact match 70.00%, F1 70.00% (± 14.49) over 10 questions; 3 without a prediction count 0; "
        "2 predictions for unknown ids ignored"
    )
    with pytest.raises(ValueError, match="no questions"):
        squad_score([], predictions)


def test_a_wrong_offset_changes_no_score(squad_file: Callable[..., Path]) -> None:
    right = read_squad(squad_file(("It is in Europe.", "Where?", [("Europe", 9)])))
    wrong = read_squad(squad_file(("It is in Europe.", "Where?", [("Europe", 2)])), on_bad_answer="skip")
    assert wrong.bad_answers
    assert squad_score(wrong, {"q0": "Europe"}) == squad_score(right, {"q0": "Europe"})


def test_predictions_file_round_trip(tmp_path: Path) -> None:
    predictions = {"q1": "“Ünï”\n\t", "q2": ""}
    path = tmp_path / "predictions.json"
    write_predictions(path, predictions)
    assert read_predictions(path) == predictions
    assert json.loads(path.read_text(encoding="utf-8")) == predictions
    assert [p.name for p in tmp_path.iterdir()] == ["predictions.json"]  # no temporary file stays behind


def test_writing_fails_whole(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"predictions\.json: cannot be written .*; check"):
        write_predictions(tmp_path / "nowhere" / "predictions.json", {})
    path = tmp_path / "predictions.json"
    write_predictions(path, {"q1": "old"})
    with pytest.raises(TypeError):
        write_predictions(path, {"q1": object()})  # type: ignore[dict-item]
    assert read_predictions(path) == {"q1": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["predictions.json"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "the file is empty"),
        ("{", "not valid JSON"),
        ("[]", "not predictions"),
        ('{"q1": 3}', "question q1 is not"),
    ],
)
def test_a_wrong_predictions_file_is_one_clear_line(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "predictions.json"
    path.write_text(content)
    with pytest.raises(UserError, match="; ") as caught:
        read_predictions(path)
    assert str(caught.value).startswith(str(path))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
