"""SQuAD v1.1 files: the official JSON, checked, as questions with their contexts and answers."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from largebatch.errors import UserError

OnBadAnswer = Literal["error", "skip"]

_JSON_NAMES = {list: "a list", dict: "an object", str: "a string", int: "an integer"}


@dataclass(frozen=True, slots=True)
class Answer:
    """One annotator's answer: its text, and where in the context it starts (None: the file's offset is wrong)."""

    text: str
    start: int | None  # character


@dataclass(frozen=True, slots=True)
class SquadExample:
    """One question on one paragraph."""

    id: str
    title: str
    question: str
    context: str
    answers: tuple[Answer, ...]

    @property
    def gold_texts(self) -> tuple[str, ...]:
        """Every annotator's text. The official score reads texts alone, so a wrong offset changes nothing here."""
        return tuple(answer.text for answer in self.answers)

    @property
    def training_answer(self) -> Answer | None:
        """The first answer that is where the file says it is: the span a model is trained on."""
        return next((answer for answer in self.answers if answer.start is not None), None)


@dataclass(frozen=True)
class SquadDataset:
    """The questions of one file, in the file's order, and what was found wrong in it."""

    path: Path
    examples: tuple[SquadExample, ...]
    num_articles: int
    num_answers: int
    bad_answers: tuple[str, ...]  # question id of every answer whose offset is wrong, in the file's order

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[SquadExample]:
        return iter(self.examples)

    @property
    def identity(self) -> str:
        """A hash of the questions, their order, contexts and answers: the same for a copy, under whatever name."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(repr(example).encode())
        return digest.hexdigest()

    @property
    def num_untrainable(self) -> int:
        """Questions without a single answer at its offset: scored as any other, left out of training."""
        return sum(example.training_answer is None for example in self.examples)

    def __str__(self) -> str:
        text = f"{self.path.name}: {len(self.examples)} questions of {self.num_articles} articles"
        if self.bad_answers:
            text += (
                f"; {len(self.bad_answers)} of {self.num_answers} answers are not at their offset, so "
                f"{self.num_untrainable} questions cannot be trained on"
            )
        return text


def read_squad(path: str | os.PathLike[str], *, on_bad_answer: OnBadAnswer = "error") -> SquadDataset:
    """Read a SQuAD v1.1 file (``.json``, or the same compressed by gzip or xz) and check all of it.

    Each answer must stand in its context at its ``answer_start``, in characters. Files of version 1.0 in the
    same format (SQuADShifts) are read; version 2.0, whose questions may have no answer, is refused, because
    neither its score nor its null threshold is the v1.1 one.

    Args:
        path: the file. Compression is told from its first bytes, not from its name.
        on_bad_answer: ``"error"`` stops at the first answer that is not at its offset. ``"skip"`` leaves it out
            of training (``Answer.start`` is None), counts it in ``SquadDataset.bad_answers``, and keeps its text
            for scoring, as the official script does.

    Raises:
        UserError: one line with file, line, article, question and remedy, if the file is missing, empty, cut
            short, not JSON, of another version, lacks a key, repeats a question id, or has a bad answer.

    Source: Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text", 2016.
    """
    if on_bad_answer not in ("error", "skip"):
        raise ValueError(f"on_bad_answer must be 'error' or 'skip', got {on_bad_answer!r}")
    path = Path(path)
    text = read_text(path)
    return _Reader(path, text, on_bad_answer).dataset()


def read_text(path: Path) -> str:
    """The UTF-8 text of a file that may be compressed by gzip or xz; UserError if it cannot be read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    try:
        if content.startswith(b"\xfd7zXZ\x00"):
            content = lzma.decompress(content)
        elif content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (lzma.LZMAError, EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path}: damaged or cut short ({error}); fetch the file again") from None
    if not content.strip():
        raise UserError(f"{path}: the file is empty; fetch the file again")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 (byte {error.start}); convert the file to UTF-8") from None


def read_json(path: Path, text: str) -> Any:
    """Parse JSON; UserError naming line and column if it is malformed."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno}); "
            "mend that line or fetch the file again"
        ) from None
    except RecursionError:
        raise UserError(f"{path}: not a SQuAD file (nested too deeply); give a file in the SQuAD v1.1 format") from None


class _Reader:
    """Walks one parsed file; holds what the messages need: the path, and the text to find line numbers in."""

    def __init__(self, path: Path, text: str, on_bad_answer: OnBadAnswer) -> None:
        self.path = path
        self.text = text
        self.on_bad_answer = on_bad_answer
        self.examples: list[SquadExample] = []
        self.num_answers = 0
        self.bad_answers: list[str] = []
        self.seen: set[str] = set()

    def dataset(self) -> SquadDataset:
        root = read_json(self.path, self.text)
        if not isinstance(root, dict):
            raise UserError(
                f'{self.path}: not a SQuAD file (no "data" at the top); give a file in the SQuAD v1.1 format'
            )
        self._check_version(root)
        articles = self._field(root, "data", list, "the file")
        for number, article in enumerate(articles, 1):
            self._article(article, number)
        if not self.examples:
            raise UserError(f"{self.path}: holds no questions; give a file in the SQuAD v1.1 format")
        return SquadDataset(self.path, tuple(self.examples), len(articles), self.num_answers, tuple(self.bad_answers))

    def _check_version(self, root: dict[str, Any]) -> None:
        version = str(root.get("version", "1.1")).removeprefix("v")  # other files in the format often leave it out
        if version in ("1.0", "1.1"):
            return
        why = "its questions may have no answer, and it is scored otherwise" if version == "2.0" else "unknown"
        raise UserError(
            f"{self.path}: SQuAD version {_shown(version)} cannot be used ({why}); give a file in the SQuAD v1.1 format"
        )

    def _article(self, article: Any, number: int) -> None:
        title = article.get("title", f"number {number}") if isinstance(article, dict) else f"number {number}"
        where = f"article {_shown(title)}"
        for index, paragraph in enumerate(self._field(article, "paragraphs", list, where), 1):
            within = f"{where}, paragraph {index}"
            context = self._field(paragraph, "context", str, within)
            if not context.strip():
                raise UserError(f"{self.path}: {within}: the context is empty; remove the paragraph")
            for question in self._field(paragraph, "qas", list, within):
                self._question(question, str(title), context, within)

    def _question(self, question: Any, title: str, context: str, within: str) -> None:
        identifier = self._field(question, "id", str, f"a question of {within}")
        where = f"{within}, question {identifier}"
        text = self._field(question, "question", str, where)
        if identifier in self.seen:
            raise self._error(identifier, where, "the id is used twice", "give each question its own id")
        self.seen.add(identifier)
        if question.get("is_impossible"):
            raise self._error(
                identifier, where, "a question without an answer (SQuAD v2.0)", "give a file in the SQuAD v1.1 format"
            )
        answers = self._field(question, "answers", list, where)
        if not answers:
            raise self._error(identifier, where, "there are no answers", "add an answer or remove the question")
        self.examples.append(
            SquadExample(
                identifier, title, text, context, tuple(self._answer(a, identifier, context, where) for a in answers)
            )
        )

    def _answer(self, answer: Any, identifier: str, context: str, where: str) -> Answer:
        text = self._field(answer, "text", str, f"an answer of {where}")
        start = self._field(answer, "answer_start", int, f"an answer of {where}")
        self.num_answers += 1
        if text and start >= 0 and context.startswith(text, start):
            return Answer(text, start)
        if self.on_bad_answer == "skip":
            self.bad_answers.append(identifier)
            return Answer(text, None)
        elsewhere = context.find(text) if text else -1
        found = f"it is at {elsewhere}" if elsewhere >= 0 else "it is nowhere in it"
        raise self._error(
            identifier,
            where,
            f"the answer {_shown(text)} is not in its context at character {start} ({found})",
            "correct answer_start, or leave such answers out of training: --skip-bad-answers, on_bad_answer='skip'",
        )

    def _field(self, holder: Any, key: str, kind: type, where: str) -> Any:
        if not isinstance(holder, dict):
            raise UserError(f"{self.path}: {where} is not a JSON object; give a file in the SQuAD v1.1 format")
        if key not in holder:
            raise UserError(f'{self.path}: {where} has no "{key}"; add it, or give a file in the SQuAD v1.1 format')
        value = holder[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(
                f'{self.path}: {where}: "{key}" must be {_JSON_NAMES[kind]}, got {_shown(value)}; correct it'
            )
        if isinstance(value, str) and not _is_text(value):
            raise UserError(f'{self.path}: {where}: "{key}" holds half a character (a lone surrogate); remove it')
        return value

    def _error(self, identifier: str, where: str, what: str, remedy: str) -> UserError:
        position = self.text.find(json.dumps(identifier))
        line = f":{self.text.count(chr(10), 0, position) + 1}" if position >= 0 else ""
        return UserError(f"{self.path}{line}: {where}: {what}; {remedy}")


def _is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8: JSON escapes can spell half a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: Any, width: int = 60) -> str:
    """A value on one line, cut to `width` characters, for a message."""
    text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."
