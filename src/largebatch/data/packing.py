"""Which sentences form which training instance: the packing of an epoch, vectorised over documents.

The only sequential thing about the published procedure is where an instance starts, because the unused sentences of
a random-next instance are put back. All random numbers are keyed by the instance's first sentence, so "where does the
next one start" is a pure function of a start and can be evaluated for many documents, or many sentences, at once.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .corpus import CorpusSplit
from .counter_rng import U64, below, chance, draw, fold_key

Int64 = NDArray[np.int64]

# The streams of random numbers and, within a stream, the counters. The reference reads the same table.
STREAM_TARGET, STREAM_PACK, STREAM_TRUNCATE_A, STREAM_TRUNCATE_B = 1, 2, 3, 4
STREAM_CANDIDATE, STREAM_MASK, STREAM_KEEP, STREAM_WORD = 5, 6, 7, 8
TARGET_IS_SHORT, TARGET_LENGTH = 0, 1
PACK_A_END, PACK_IS_RANDOM, PACK_RANDOM_START, PACK_RANDOM_DOCUMENT = 0, 1, 2, 3  # the last and the nine after it
RANDOM_DOCUMENT_TRIES = 10

# Below this many documents still active, the rest is packed by looking up the successor of every sentence instead.
_MIN_LOCKSTEP_DOCUMENTS = 256
_BLOCK_SENTENCES = 1 << 18
_BLOCK_DOCUMENTS = 1 << 18


@dataclass(frozen=True)
class PackingSettings:
    """What the packing of an epoch depends on, beside the corpus."""

    seed: int
    epoch: int
    sequence_length: int
    short_sequence_prob: float

    @property
    def max_num_tokens(self) -> int:
        return self.sequence_length - 3  # [CLS] A [SEP] B [SEP]

    def stream_key(self, stream: int) -> int:
        return fold_key(self.seed, self.epoch, self.sequence_length, stream)

    def keys(self, stream: int, items: Int64) -> U64:
        """One key for each item (a document or an instance's first sentence) in a stream."""
        return draw(self.stream_key(stream), items)


@dataclass(frozen=True)
class Chunks:
    """Instances before B is chosen: sentences [start, end) of a document, A is [start, a_end)."""

    start: Int64
    end: Int64
    a_end: Int64
    is_random: NDArray[np.bool_]
    target: Int64

    @property
    def next_start(self) -> Int64:
        """Where the next instance of the document starts: the segments a random next leaves unused are put back."""
        return np.where(self.is_random, self.a_end, self.end)


def target_lengths(documents: Int64, settings: PackingSettings) -> Int64:
    """Tokens to collect for each instance of a document: the maximum or, with a small chance, uniform from 2 to it."""
    keys = settings.keys(STREAM_TARGET, documents)
    short = chance(draw(keys, TARGET_IS_SHORT), settings.short_sequence_prob)
    lengths = 2 + below(draw(keys, TARGET_LENGTH), settings.max_num_tokens - 1)
    return np.where(short, lengths, settings.max_num_tokens)


def form_chunks(
    split: CorpusSplit, start: Int64, document_end: Int64, target: Int64, settings: PackingSettings
) -> Chunks:
    """The chunk that starts at each given sentence, and its cut into A and B."""
    offsets = split.sentence_offsets
    end = np.minimum(np.searchsorted(offsets, offsets[start] + target, side="left"), document_end)
    keys = settings.keys(STREAM_PACK, start)
    num_segments = end - start
    a_end = start + 1 + np.where(num_segments > 1, below(draw(keys, PACK_A_END), np.maximum(num_segments - 1, 1)), 0)
    is_random = (num_segments == 1) | chance(draw(keys, PACK_IS_RANDOM), 0.5)
    return Chunks(start, end, a_end, is_random, target)


def epoch_starts(split: CorpusSplit, settings: PackingSettings) -> Int64:
    """The first sentence of every instance of an epoch, ascending: an instance's index is its place here."""
    found: list[Int64] = []
    for first in range(0, split.num_documents, _BLOCK_DOCUMENTS):
        documents = np.arange(first, min(first + _BLOCK_DOCUMENTS, split.num_documents))
        starts = split.document_offsets[documents]
        ends = split.document_offsets[documents + 1]
        targets = target_lengths(documents, settings)
        while starts.size >= _MIN_LOCKSTEP_DOCUMENTS:  # one round is one instance of every active document
            found.append(starts)
            starts = form_chunks(split, starts, ends, targets, settings).next_start
            active = starts < ends
            starts, ends, targets = starts[active], ends[active], targets[active]
        for start, end, target in zip(starts.tolist(), ends.tolist(), targets.tolist(), strict=True):
            found.append(_starts_in_document(split, start, end, target, settings))
    return np.sort(np.concatenate(found)) if found else np.zeros(0, dtype=np.int64)


def _starts_in_document(split: CorpusSplit, start: int, end: int, target: int, settings: PackingSettings) -> Int64:
    """The same for the rest of one long document: the successor of every sentence, then a walk along them."""
    starts = []
    while start < end:
        base, block_end = start, min(start + _BLOCK_SENTENCES, end)
        sentences = np.arange(base, block_end)
        constant = np.full_like(sentences, end), np.full_like(sentences, target)
        successor = form_chunks(split, sentences, *constant, settings).next_start.tolist()
        while start < block_end:
            starts.append(start)
            start = successor[start - base]
    return np.array(starts, dtype=np.int64)


@dataclass(frozen=True)
class Segments:
    """The token ranges of instances after truncation: A is tokens [a_first, a_first + a_length) of the split."""

    a_first: Int64
    a_length: Int64
    b_first: Int64
    b_length: Int64
    is_random: NDArray[np.bool_]

    @property
    def lengths(self) -> Int64:
        """Real tokens of each instance, the three special ones included."""
        return self.a_length + self.b_length + 3


def form_segments(split: CorpusSplit, start: Int64, settings: PackingSettings) -> Segments:
    """A and B of the instances that start at the given sentences: choose B, then truncate the longer one."""
    offsets = split.sentence_offsets
    document = np.searchsorted(split.document_offsets, start, side="right") - 1
    target = target_lengths(document, settings)
    chunks = form_chunks(split, start, split.document_offsets[document + 1], target, settings)
    a_first, a_length = offsets[start], offsets[chunks.a_end] - offsets[start]
    b_first, b_length = offsets[chunks.a_end], offsets[chunks.end] - offsets[chunks.a_end]

    random = np.flatnonzero(chunks.is_random)
    if random.size:
        keys = settings.keys(STREAM_PACK, start[random])
        other = _other_document(split.num_documents, document[random], keys)
        other_first, other_end = split.document_offsets[other], split.document_offsets[other + 1]
        b_start = other_first + below(draw(keys, PACK_RANDOM_START), other_end - other_first)
        b_target = np.maximum(target[random] - a_length[random], 1)  # at least one sentence, however long A is
        b_end = np.minimum(np.searchsorted(offsets, offsets[b_start] + b_target, side="left"), other_end)
        b_first[random], b_length[random] = offsets[b_start], offsets[b_end] - offsets[b_start]

    a_kept, b_kept = truncated_lengths(a_length, b_length, settings.max_num_tokens)
    a_front = front_removals(a_length - a_kept, settings.keys(STREAM_TRUNCATE_A, start))
    b_front = front_removals(b_length - b_kept, settings.keys(STREAM_TRUNCATE_B, start))
    return Segments(a_first + a_front, a_kept, b_first + b_front, b_kept, chunks.is_random)


def _other_document(num_documents: int, document: Int64, keys: U64) -> Int64:
    """A random document for each instance: the first of ten draws that differs from its own, or else the tenth."""
    other = below(draw(keys, PACK_RANDOM_DOCUMENT), num_documents)
    for attempt in range(1, RANDOM_DOCUMENT_TRIES):
        again = np.flatnonzero(other == document)
        if not again.size:
            break
        other[again] = below(draw(keys[again], PACK_RANDOM_DOCUMENT + attempt), num_documents)
    return other


def truncated_lengths(a_length: Int64, b_length: Int64, max_num_tokens: int) -> tuple[Int64, Int64]:
    """Lengths after tokens were taken from the longer side (B where equal) until both fit into `max_num_tokens`."""
    a_kept = np.minimum(a_length, np.maximum(max_num_tokens - b_length, (max_num_tokens + 1) // 2))
    b_kept = np.minimum(b_length, np.maximum(max_num_tokens - a_length, max_num_tokens // 2))
    return a_kept, b_kept


def front_removals(num_removed: Int64, keys: U64) -> Int64:
    """How many of `num_removed` tokens go from the front: one fair coin each, bit k % 64 of word k // 64."""
    result = np.zeros_like(num_removed)
    rows = np.flatnonzero(num_removed)
    if not rows.size:
        return result
    num_words = -(-num_removed[rows] // 64)
    row = np.repeat(rows, num_words)
    word = np.arange(len(row)) - np.repeat(np.cumsum(num_words) - num_words, num_words)
    coins = np.minimum(num_removed[row] - 64 * word, 64)
    words = draw(keys[row], word) >> (64 - coins).astype(np.uint64)
    return np.bincount(row, weights=_popcount(words), minlength=len(result)).astype(np.int64)


def _popcount(x: U64) -> NDArray[np.uint64]:
    """Set bits of each word (numpy has this from 2.0 only)."""
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (x * np.uint64(0x0101010101010101)) >> np.uint64(56)
