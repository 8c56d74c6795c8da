"""SQuAD questions as BERT inputs: windows that slide over contexts too long for one sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from largebatch.errors import UserError
from largebatch.evaluate.squad_data import SquadExample

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

_TEXTS_PER_CALL = 2048  # bounds the memory of tokenizers' Encoding objects, about 1 kB a token


@dataclass(frozen=True)
class SquadFeatures:
    """Windows ``[CLS] question [SEP] part of the context [SEP]``, unpadded, end to end in flat arrays.

    F windows hold T tokens in all; window f's are ``offsets[f]:offsets[f + 1]`` of every array of T. A position
    is counted from the window's [CLS].
    """

    examples: tuple[SquadExample, ...]
    token_ids: np.ndarray  # [T] int32
    offsets: np.ndarray  # [F + 1] int64
    example_index: np.ndarray  # [F] int32: whose question it is
    context_start: np.ndarray  # [F] int32: position of the first context token; those before are of type 0
    max_context: np.ndarray  # [T] bool: a context token that no other window sees with more context
    start_positions: np.ndarray  # [F] int32: first token of the answer; 0 = [CLS]: the answer is not in the window
    end_positions: np.ndarray  # [F] int32: its last token
    trainable: np.ndarray  # [F] bool: False where the question has no answer that can be marked
    char_spans: np.ndarray  # [C, 2] int32: [begin, end) in its context of each token of each context
    char_start: np.ndarray  # [F] int64: row in char_spans of the window's first context token
    pad_id: int

    def __len__(self) -> int:
        return len(self.example_index)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each window, [F] int64."""
        return np.diff(self.offsets)

    def answered(self) -> SquadFeatures:
        """The same windows, of which only those that hold their answer are trained on.

        SQuAD's own recipe trains the others to point at [CLS]. Where windows are short most are of that kind, and a
        small model then learns little else.
        """
        return dataclasses.replace(self, trainable=self.trainable & (self.start_positions > 0))

    def text(self, window: int, start: int, end: int) -> str:
        """The characters of the original context from token position `start` to `end`, both included."""
        row = int(self.char_start[window]) - int(self.context_start[window])
        context = self.examples[int(self.example_index[window])].context
        return context[int(self.char_spans[row + start, 0]) : int(self.char_spans[row + end, 1])]

    def batch(self, windows: Sequence[int] | np.ndarray) -> dict[str, torch.Tensor]:
        """The model's input for some windows, padded to the longest of them: a micro-batch.

        Returns:
            ``input_ids``, ``token_type_ids`` [B, L] int64, ``attention_mask`` [B, L] bool, ``start_positions``,
            ``end_positions`` [B] int64.
        """
        windows = np.asarray(windows)
        lengths = self.offsets[windows + 1] - self.offsets[windows]
        positions = np.arange(lengths.max(initial=0))
        mask = positions < lengths[:, None]
        flat = np.where(mask, self.offsets[windows][:, None] + positions, 0)
        arrays = {
            "input_ids": np.where(mask, self.token_ids[flat], self.pad_id).astype(np.int64),
            "token_type_ids": (mask & (positions >= self.context_start[windows][:, None])).astype(np.int64),
            "attention_mask": mask,
            "start_positions": self.start_positions[windows].astype(np.int64),
            "end_positions": self.end_positions[windows].astype(np.int64),
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def squad_features(
    examples: Sequence[SquadExample],
    tokenizer: Tokenizer,
    *,
    max_seq_length: int = 384,
    doc_stride: int = 128,
    max_query_length: int = 64,
) -> SquadFeatures:
    """Tokenise questions and contexts, cut the contexts into windows, and mark the answers.

    1. Each distinct context is tokenised once; tokens keep their [begin, end) characters of the original text.
    2. A question keeps its first `max_query_length` tokens; a window gets what then remains of `max_seq_length`.
    3. Windows start `doc_stride` tokens apart until one reaches the end of the context, so every token is in one.
    4. The answer's tokens are those that share a character with it. A window that lacks one of them points to
       [CLS], for start and end.
    5. A token in several windows is scored in the one where it has the most context on its scarcer side
       (``max_context``).

    Args:
        examples: what ``read_squad`` returns; the first answer that is at its offset is the one marked.
        tokenizer: a `tokenizers` tokenizer with [CLS], [SEP] and [PAD]. Its own truncation, padding and special
            tokens play no part, and it is left as it was.
        max_seq_length: tokens in a window, [CLS] and two [SEP] included; at most the model's positions.
        doc_stride: tokens from one window's start to the next's. Smaller costs more windows and gives each token
            more context; above the room left in a window it acts as that room, and windows do not overlap.
        max_query_length: tokens kept of a question; must leave room for at least one context token.

    Raises:
        ValueError: a length out of its range.
        UserError: the tokenizer lacks a special token.

    Source: Devlin et al. 2019, section 4.2 and the settings published with it (384, 128, 64).
    """
    if max_query_length < 1 or doc_stride < 1:
        raise ValueError(f"max_query_length and doc_stride must be >= 1, got {max_query_length} and {doc_stride}")
    if max_seq_length < max_query_length + 4:
        raise ValueError(
            f"max_seq_length must be at least max_query_length + 4 = {max_query_length + 4} "
            f"to hold a question and one token of its context, got {max_seq_length}"
        )
    examples = tuple(examples)
    cls_id, sep_id, pad_id = (special_id(tokenizer, name) for name in ("[CLS]", "[SEP]", "[PAD]"))
    tokenizer = bare_copy(tokenizer)
    contexts = {context: row for row, context in enumerate(dict.fromkeys(e.context for e in examples))}
    context_ids, char_spans, bases = _tokenize_contexts(list(contexts), tokenizer)
    questions = _tokenize_questions([e.question for e in examples], tokenizer, max_query_length)

    pieces: list[np.ndarray] = []
    best: list[np.ndarray] = []
    rows: list[tuple[int, int, int, int, int, bool]] = []  # example, context_start, start, end, char_start, trainable
    cls, sep = np.array([cls_id], np.int32), np.array([sep_id], np.int32)
    for index, (example, question) in enumerate(zip(examples, questions, strict=True)):
        row = contexts[example.context]
        ids = context_ids[row]
        first, last = _answer_tokens(example, char_spans[bases[row] : bases[row] + len(ids)])
        prefix = np.concatenate([cls, question, sep])
        starts, stops = _windows(len(ids), max_seq_length - len(prefix) - 1, doc_stride)
        owners = _max_context_window(starts, stops, len(ids))
        for window, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
            pieces += [prefix, ids[start:stop], sep]
            best += [np.zeros(len(prefix), bool), owners[start:stop] == window, np.zeros(1, bool)]
            shift = len(prefix) - start
            inside = 0 <= first <= last and start <= first and last < stop
            span = (first + shift, last + shift) if inside else (0, 0)
            rows.append((index, len(prefix), *span, bases[row] + start, first >= 0))

    columns = np.array(rows, dtype=np.int64).reshape(-1, 6).T
    lengths = np.add.reduceat([len(p) for p in pieces], np.arange(0, len(pieces), 3)) if pieces else np.empty(0, int)
    return SquadFeatures(
        examples=examples,
        token_ids=np.concatenate(pieces) if pieces else np.empty(0, np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        example_index=columns[0].astype(np.int32),
        context_start=columns[1].astype(np.int32),
        max_context=np.concatenate(best) if best else np.empty(0, bool),
        start_positions=columns[2].astype(np.int32),
        end_positions=columns[3].astype(np.int32),
        trainable=columns[5].astype(bool),
        char_spans=char_spans,
        char_start=columns[4],
        pad_id=pad_id,
    )


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a special token; UserError if the vocabulary lacks it."""
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        raise UserError(f"the tokenizer's vocabulary has no {token}; use a BERT vocabulary that has it")
    return int(token_id)


def bare_copy(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that neither truncates nor pads: published tokenizer.json files often carry both settings."""
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def _encode(texts: Sequence[str], tokenizer: Tokenizer) -> list[Encoding]:
    return tokenizer.encode_batch(list(texts), add_special_tokens=False)


def _tokenize_contexts(contexts: list[str], tokenizer: Tokenizer) -> tuple[list[np.ndarray], np.ndarray, list[int]]:
    """Token ids of each context; the characters of all their tokens [C, 2]; each context's first row therein."""
    ids: list[np.ndarray] = []
    spans: list[np.ndarray] = [np.empty((0, 2), np.int32)]
    for begin in range(0, len(contexts), _TEXTS_PER_CALL):
        for encoding in _encode(contexts[begin : begin + _TEXTS_PER_CALL], tokenizer):
            ids.append(np.array(encoding.ids, np.int32))
            spans.append(np.array(encoding.offsets, np.int32).reshape(-1, 2))
    bases = np.cumsum([0] + [len(i) for i in ids]).tolist()
    return ids, np.concatenate(spans), bases


def _tokenize_questions(questions: list[str], tokenizer: Tokenizer, max_tokens: int) -> list[np.ndarray]:
    ids: list[np.ndarray] = []
    for begin in range(0, len(questions), _TEXTS_PER_CALL):
        encodings = _encode(questions[begin : begin + _TEXTS_PER_CALL], tokenizer)
        ids += [np.array(encoding.ids[:max_tokens], np.int32) for encoding in encodings]
    return ids


def _answer_tokens(example: SquadExample, char_spans: np.ndarray) -> tuple[int, int]:
    """First and last context token that share a character with the training answer; (-1, -1) if there is none."""
    answer = example.training_answer
    if answer is None or answer.start is None:
        return -1, -1
    # Tokens are in the order of the text, so both columns are sorted.
    first = int(np.searchsorted(char_spans[:, 1], answer.start, side="right"))
    last = int(np.searchsorted(char_spans[:, 0], answer.start + len(answer.text), side="left")) - 1
    return (first, last) if first <= last else (-1, -1)  # an answer of characters that the tokenizer drops


def _windows(num_tokens: int, room: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """[start, stop) of each window over a context of `num_tokens` with `room` tokens to a window."""
    beyond = max(num_tokens - room, 0)
    stride = min(stride, room)
    starts = np.arange(-(-beyond // stride) + 1) * stride
    return starts, np.minimum(starts + room, num_tokens)


def _max_context_window(starts: np.ndarray, stops: np.ndarray, num_tokens: int) -> np.ndarray:
    """For each context token, the window in which min(tokens to its left, to its right) is largest.

    As published, 0.01 of the window's length is added, which settles ties between windows of unequal length;
    the first window wins those that remain.
    """
    tokens = np.arange(num_tokens)
    left = tokens - starts[:, None]
    right = stops[:, None] - 1 - tokens
    scarcer = np.minimum(left, right)  # negative outside the window
    # In hundredths, so that the arithmetic is exact.
    score = np.where(scarcer >= 0, 100 * scarcer + (stops - starts)[:, None], -1)
    owners: np.ndarray = score.argmax(axis=0)
    return owners
