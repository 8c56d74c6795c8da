"""The official SQuAD v1.1 score: exact match and F1 between texts."""

from __future__ import annotations

import json
import math
import os
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from largebatch.errors import UserError
from largebatch.evaluate.squad_data import SquadExample, read_json, read_text

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class SquadScore:
    """Exact match and F1 in percent, averaged over all questions of the file."""

    exact_match: float
    f1: float
    f1_error: float  # standard error of that average, over the questions: twice it, and a difference may be chance
    num_questions: int
    num_missing: int  # questions without a prediction: each counts 0
    num_unknown: int  # predictions for ids the file does not have: ignored

    def metrics(self) -> dict[str, float]:
        """The figures under the names that metrics files use."""
        return {"exact_match": self.exact_match, "f1": self.f1, "f1_error": self.f1_error}

    def __str__(self) -> str:
        f1 = f"F1 {self.f1:.2f}% (± {self.f1_error:.2f})"
        text = f"exact match {self.exact_match:.2f}%, {f1} over {self.num_questions} questions"
        if self.num_missing:
            text += f"; {self.num_missing} without a prediction count 0"
        if self.num_unknown:
            text += f"; {self.num_unknown} predictions for unknown ids ignored"
        return text


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, without the words a, an, the, with single spaces, in that order."""
    text = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def answer_scores(prediction: str, gold_texts: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1, each in [0, 1], of one prediction: the best over the gold texts, each on its own.

    F1 is that of the bags of normalised words. Two texts that both normalise to nothing ("the" and "a") match
    exactly and have F1 0: so it is in the official v1.1 script, and otherwise in that of v2.0.
    """
    predicted = normalize_answer(prediction)
    words = Counter(predicted.split())
    num_words = words.total()
    exact = best = 0.0
    for text in gold_texts:
        gold = normalize_answer(text)
        if predicted == gold:
            exact = 1.0
        gold_words = gold.split()
        same = (words & Counter(gold_words)).total()
        if same:
            best = max(best, 2 * same / (num_words + len(gold_words)))  # harmonic mean of same/num_words, same/len
    return exact, best


def squad_score(examples: Iterable[SquadExample], predictions: Mapping[str, str]) -> SquadScore:
    """Score predictions as the official script does.

    Args:
        examples: the questions (a ``SquadDataset`` or its examples).
        predictions: question id -> answer text. A question that is missing scores 0; an unknown id is ignored;
            both are counted in the result.

    Raises:
        ValueError: if there are no questions.

    Source: Rajpurkar et al. 2016, section 6.1, and the evaluation script published with SQuAD v1.1.
    """
    exact = f1 = f1_squares = 0.0
    num_questions = num_missing = 0
    for example in examples:
        num_questions += 1
        prediction = predictions.get(example.id)
        if prediction is None:
            num_missing += 1
            continue
        em, overlap = answer_scores(prediction, example.gold_texts)
        exact += em
        f1 += overlap
        f1_squares += overlap**2
    if not num_questions:
        raise ValueError("there are no questions to score")
    num_unknown = len(predictions) - (num_questions - num_missing)
    mean = f1 / num_questions
    variance = max(0.0, f1_squares / num_questions - mean**2)
    return SquadScore(
        exact_match=100 * exact / num_questions,
        f1=100 * mean,
        f1_error=100 * math.sqrt(variance / num_questions),
        num_questions=num_questions,
        num_missing=num_missing,
        num_unknown=num_unknown,
    )


def read_predictions(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read a predictions file: one JSON object, question id -> text, as the official script takes it.

    Raises:
        UserError: one line, if the file is missing, empty, not JSON, or not such an object.
    """
    path = Path(path)
    predictions = read_json(path, read_text(path))
    if not isinstance(predictions, dict):
        raise UserError(f'{path}: not predictions; give one JSON object {{"question id": "answer text", ...}}')
    for identifier, text in predictions.items():
        if not isinstance(text, str):
            raise UserError(f"{path}: the prediction for question {identifier} is not a string; write it as a string")
    return predictions


def write_predictions(path: str | os.PathLike[str], predictions: Mapping[str, str]) -> None:
    """Write a predictions file that the official script reads; whole or not at all."""
    write_json(Path(path), dict(predictions))


def write_json(path: Path, content: object) -> None:
    """Write JSON under a temporary name, then rename: a crash leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); check that the folder exists") from None
    finally:
        temporary.unlink(missing_ok=True)
