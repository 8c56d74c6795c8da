"""The specification of the training instances: Google's `create_pretraining_data`, one sentence and token at a time.

To be read beside the published program, whose order of decisions it keeps. `instances.PretrainingInstances` must give
the same instances. Both ask for every random number by name: (stream, item, counter), where the item is the document
or the first sentence of the instance; the program draws them from one sequential generator instead.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .counter_rng import GOLDEN, fold_key, mix64_int
from .packing import (
    PACK_A_END,
    PACK_IS_RANDOM,
    PACK_RANDOM_DOCUMENT,
    PACK_RANDOM_START,
    STREAM_CANDIDATE,
    STREAM_KEEP,
    STREAM_MASK,
    STREAM_PACK,
    STREAM_TARGET,
    STREAM_TRUNCATE_A,
    STREAM_TRUNCATE_B,
    STREAM_WORD,
    TARGET_IS_SHORT,
    TARGET_LENGTH,
)
from .vocabulary import Vocabulary

Tokens = list[int]
Document = Sequence[Sequence[int]]


@dataclass(frozen=True)
class ReferenceInstance:
    """One instance, unpadded."""

    input_ids: Tokens
    token_type_ids: list[int]
    masked_positions: list[int]
    masked_labels: Tokens
    is_random_next: bool


@dataclass(frozen=True)
class RandomNumbers:
    """Named random numbers of one epoch."""

    seed: int
    epoch: int
    sequence_length: int

    def bits(self, stream: int, item: int, counter: int) -> int:
        key = fold_key(self.seed, self.epoch, self.sequence_length, stream)
        item_key = mix64_int(key + (item + 1) * GOLDEN)
        return mix64_int(item_key + (counter + 1) * GOLDEN)

    def random(self, stream: int, item: int, counter: int) -> float:
        """Uniform in [0, 1)."""
        return (self.bits(stream, item, counter) >> 11) * 2.0**-53

    def randint(self, stream: int, item: int, counter: int, low: int, high: int) -> int:
        """Uniform from low to high, both included."""
        return low + ((self.bits(stream, item, counter) >> 32) * (high - low + 1) >> 32)

    def coin(self, stream: int, item: int, flip: int) -> bool:
        """The `flip`-th fair coin of an item: 64 of them to a number, the highest bit of a number last."""
        return bool(self.bits(stream, item, flip // 64) >> (63 - flip % 64) & 1)


def reference_epoch(
    documents: Sequence[Document],
    vocabulary: Vocabulary,
    sequence_length: int,
    *,
    seed: int,
    epoch: int,
    max_predictions: int,
    masked_lm_prob: float = 0.15,
    short_sequence_prob: float = 0.1,
    whole_word_masking: bool = False,
) -> list[ReferenceInstance]:
    """All instances of an epoch in the order of their indices; arguments as for `PretrainingInstances`."""
    numbers = RandomNumbers(seed, epoch, sequence_length)
    special = vocabulary.special_ids
    instances = []
    first_sentence = 0
    for index, document in enumerate(documents):
        for start, tokens_a, tokens_b, is_random_next in pairs_from_document(
            documents, index, first_sentence, sequence_length - 3, short_sequence_prob, numbers
        ):
            tokens = [special["[CLS]"], *tokens_a, special["[SEP]"], *tokens_b, special["[SEP]"]]
            types = [0] * (len(tokens_a) + 2) + [1] * (len(tokens_b) + 1)
            not_candidates = {0, len(tokens_a) + 1, len(tokens) - 1}
            output, positions, labels = masked_lm_predictions(
                tokens, not_candidates, vocabulary, masked_lm_prob, max_predictions, whole_word_masking, start, numbers
            )
            instances.append(ReferenceInstance(output, types, positions, labels, is_random_next))
        first_sentence += len(document)
    return instances


def pairs_from_document(
    documents: Sequence[Document],
    document_index: int,
    first_sentence: int,
    max_num_tokens: int,
    short_sequence_prob: float,
    numbers: RandomNumbers,
) -> list[tuple[int, Tokens, Tokens, bool]]:
    """(first sentence, A, B, whether B is random) of each instance of a document."""
    document = documents[document_index]
    target_length = max_num_tokens
    if numbers.random(STREAM_TARGET, document_index, TARGET_IS_SHORT) < short_sequence_prob:
        target_length = numbers.randint(STREAM_TARGET, document_index, TARGET_LENGTH, 2, max_num_tokens)
    pairs = []
    chunk: list[Sequence[int]] = []
    chunk_length = 0
    i = 0
    while i < len(document):
        chunk.append(document[i])
        chunk_length += len(document[i])
        if i == len(document) - 1 or chunk_length >= target_length:
            start = first_sentence + i + 1 - len(chunk)
            a_end = 1
            if len(chunk) >= 2:
                a_end = numbers.randint(STREAM_PACK, start, PACK_A_END, 1, len(chunk) - 1)
            tokens_a = [token for sentence in chunk[:a_end] for token in sentence]
            is_random_next = len(chunk) == 1 or numbers.random(STREAM_PACK, start, PACK_IS_RANDOM) < 0.5
            if is_random_next:
                target_b_length = target_length - len(tokens_a)
                for attempt in range(10):
                    other = numbers.randint(STREAM_PACK, start, PACK_RANDOM_DOCUMENT + attempt, 0, len(documents) - 1)
                    if other != document_index:
                        break
                random_document = documents[other]
                random_start = numbers.randint(STREAM_PACK, start, PACK_RANDOM_START, 0, len(random_document) - 1)
                tokens_b: Tokens = []
                for sentence in random_document[random_start:]:
                    tokens_b.extend(sentence)
                    if len(tokens_b) >= target_b_length:
                        break
                i -= len(chunk) - a_end  # put the unused segments back
            else:
                tokens_b = [token for sentence in chunk[a_end:] for token in sentence]
            truncate_pair(tokens_a, tokens_b, max_num_tokens, start, numbers)
            pairs.append((start, tokens_a, tokens_b, is_random_next))
            chunk = []
            chunk_length = 0
        i += 1
    return pairs


def truncate_pair(tokens_a: Tokens, tokens_b: Tokens, max_num_tokens: int, start: int, numbers: RandomNumbers) -> None:
    """Take tokens from the longer side, front or back, until both fit."""
    removed_a = removed_b = 0
    while len(tokens_a) + len(tokens_b) > max_num_tokens:
        if len(tokens_a) > len(tokens_b):
            longer, from_front = tokens_a, numbers.coin(STREAM_TRUNCATE_A, start, removed_a)
            removed_a += 1
        else:
            longer, from_front = tokens_b, numbers.coin(STREAM_TRUNCATE_B, start, removed_b)
            removed_b += 1
        longer.pop(0 if from_front else -1)


def masked_lm_predictions(
    tokens: Tokens,
    not_candidates: set[int],
    vocabulary: Vocabulary,
    masked_lm_prob: float,
    max_predictions: int,
    whole_word_masking: bool,
    start: int,
    numbers: RandomNumbers,
) -> tuple[Tokens, list[int], Tokens]:
    """(what the model sees, the predicted positions, the tokens that stood there)."""
    candidates: list[list[int]] = []
    for position, token in enumerate(tokens):
        if position in not_candidates:
            continue
        if whole_word_masking and candidates and vocabulary.tokens[token].startswith("##"):
            candidates[-1].append(position)
        else:
            candidates.append([position])
    candidates.sort(key=shuffle_key(start, numbers))
    num_to_predict = min(max_predictions, max(1, round(len(tokens) * masked_lm_prob)))
    output = list(tokens)
    predicted: list[int] = []
    for positions in candidates:
        if len(predicted) >= num_to_predict:
            break
        if len(predicted) + len(positions) > num_to_predict:
            continue
        for position in positions:
            if numbers.random(STREAM_MASK, start, position) < 0.8:
                output[position] = vocabulary.special_ids["[MASK]"]
            elif numbers.random(STREAM_KEEP, start, position) < 0.5:
                pass
            else:
                output[position] = numbers.randint(STREAM_WORD, start, position, 0, len(vocabulary) - 1)
            predicted.append(position)
    predicted.sort()
    return output, predicted, [tokens[position] for position in predicted]


def shuffle_key(start: int, numbers: RandomNumbers) -> Callable[[list[int]], int]:
    """The order of a shuffle: by the random bits of a candidate's first position, which replaces the lowest 16."""
    return lambda positions: (numbers.bits(STREAM_CANDIDATE, start, positions[0]) & ~0xFFFF) | positions[0]
