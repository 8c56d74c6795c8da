"""Masked-LM and next-sentence training instances, made on the fly, each a pure function of (seed, epoch, index)."""

from collections import OrderedDict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from largebatch.errors import UserError

from .corpus import CorpusSplit
from .counter_rng import draw
from .masking import choose_tokens, choose_words, num_to_predict, replacements
from .packing import (
    STREAM_CANDIDATE,
    STREAM_KEEP,
    STREAM_MASK,
    STREAM_WORD,
    PackingSettings,
    Segments,
    epoch_starts,
    form_segments,
)

Int64 = NDArray[np.int64]

_CACHED_EPOCHS = 2
# Batches are made in parts whose arrays fit into a core's cache.
_PART_TOKENS = 1 << 15


class PretrainingInstances:
    """BERT's pre-training instances over a corpus split, with the semantics of Google's `create_pretraining_data`.

    1. Sentences of one document are collected until they reach a target length: L - 3 tokens or, for a document in
       ten (`short_sequence_prob`), a length uniform in [2, L - 3], drawn once per document and epoch.
    2. The collected sentences are cut at a random one into A and B. With one sentence only, or half of the time, B is
       instead a run of sentences from a random place of a random other document (ten tries to find another), and
       those of the cut B are put back for the next instance.
    3. While A and B have more than L - 3 tokens, the longer one loses a token, front or back with equal chance.
    4. ``[CLS] A [SEP] B [SEP]``; min(max_predictions, max(1, round(masked_lm_prob * length))) tokens of A and B are
       predicted: 80% of them are shown as [MASK], 10% as they are, 10% as a word piece uniform over the vocabulary.

    Where the published program writes ten differently masked copies to disk, every epoch here has its own packing,
    pairs and masks. `largebatch.data.reference_instances` is the same, one token at a time.

    Args:
        corpus_split: from `Corpus.split`.
        sequence_length: L; sequences are padded at the end to this length.
        seed: of all random choices.
        max_predictions: per instance; None is round(masked_lm_prob * L), at length 128 at least 20.
        masked_lm_prob: share of the tokens to predict.
        short_sequence_prob: share of the documents packed to a shorter target.
        whole_word_masking: predict all pieces of a word or none.

    Raises:
        ValueError: an argument out of its range.
        UserError: the split is empty.

    Source: the BERT paper (arXiv 1810.04805), sections 3.1 and A.1-A.2, and the program published with it.
    """

    def __init__(
        self,
        corpus_split: CorpusSplit,
        sequence_length: int,
        *,
        seed: int,
        max_predictions: int | None = None,
        masked_lm_prob: float = 0.15,
        short_sequence_prob: float = 0.1,
        whole_word_masking: bool = False,
    ) -> None:
        if not 5 <= sequence_length <= 65535:
            raise ValueError(f"sequence_length must lie in [5, 65535], got {sequence_length}")
        for name, value in (("masked_lm_prob", masked_lm_prob), ("short_sequence_prob", short_sequence_prob)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], got {value}")
        if max_predictions is None:
            max_predictions = max(20 if sequence_length == 128 else 1, round(masked_lm_prob * sequence_length))
        if max_predictions < 1:
            raise ValueError(f"max_predictions must be at least 1, got {max_predictions}")
        if not corpus_split.num_sentences:
            raise UserError(f"the corpus split {corpus_split.name!r} is empty: no instance can be made of it")
        self.split = corpus_split
        self.sequence_length = sequence_length
        self.seed = seed
        self.max_predictions = max_predictions
        self.masked_lm_prob = masked_lm_prob
        self.short_sequence_prob = short_sequence_prob
        self.whole_word_masking = whole_word_masking
        self._starts: OrderedDict[int, Int64] = OrderedDict()

    def num_instances(self, epoch: int) -> int:
        """Instances in the epoch; it varies a little from epoch to epoch, as the packing does."""
        return len(self._epoch_starts(epoch))

    def segments(self, epoch: int, indices: Int64) -> Segments:
        """The token ranges of instances, before masking: enough for their lengths and labels."""
        starts = self._epoch_starts(epoch)
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and not (indices.min() >= 0 and indices.max() < len(starts)):
            raise IndexError(
                f"epoch {epoch} has instances 0 to {len(starts) - 1}, not {indices.min()}..{indices.max()}"
            )
        return form_segments(self.split, starts[indices], self._settings(epoch))

    def batch(self, epoch: int, indices: Int64) -> dict[str, NDArray]:
        """The instances with the given indices, B of them.

        Returns:
            input_ids int32 [B, L], token_type_ids int8 [B, L], lengths int32 [B] (real tokens; then [PAD]),
            masked_positions int64 [N] (flat into B * L, ascending), masked_labels int32 [N],
            next_sentence_labels int64 [B] (1: B is not the continuation of A).
        """
        indices = np.asarray(indices, dtype=np.int64)
        part = max(1, _PART_TOKENS // self.sequence_length)
        parts = [self._part(epoch, indices[first : first + part]) for first in range(0, max(len(indices), 1), part)]
        for number, content in enumerate(parts):
            content["masked_positions"] += number * part * self.sequence_length
        return {name: np.concatenate([content[name] for content in parts]) for name in parts[0]}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_starts": OrderedDict()}  # cheap to make again, large to send

    def _part(self, epoch: int, indices: Int64) -> dict[str, NDArray]:
        settings, L = self._settings(epoch), self.sequence_length
        special = self.split.vocabulary.special_ids
        segments = self.segments(epoch, indices)
        starts = self._epoch_starts(epoch)[indices]

        column_L = np.arange(L)
        first_sep_B1 = (segments.a_length + 1)[:, None]
        last_sep_B1 = (segments.lengths - 1)[:, None]
        in_b_BL = (column_L > first_sep_B1) & (column_L < last_sep_B1)
        candidate_BL = in_b_BL | (column_L < first_sep_B1)
        candidate_BL[:, 0] = False
        source_BL = np.where(
            in_b_BL,
            (segments.b_first[:, None] - first_sep_B1 - 1) + column_L,
            (segments.a_first[:, None] - 1) + column_L,
        )
        source_BL[~candidate_BL] = 0
        input_ids = self.split.take(source_BL).astype(np.int32)
        input_ids[~candidate_BL] = special["[PAD]"]
        input_ids[:, 0] = special["[CLS]"]
        np.put_along_axis(input_ids, first_sep_B1, special["[SEP]"], axis=1)
        np.put_along_axis(input_ids, last_sep_B1, special["[SEP]"], axis=1)

        num_B = num_to_predict(segments.lengths, self.masked_lm_prob, self.max_predictions)
        candidate_keys = settings.keys(STREAM_CANDIDATE, starts)
        if not len(indices):
            positions = np.zeros(0, dtype=np.int64)
        elif self.whole_word_masking:
            continues_BL = self.split.vocabulary.continues_word[input_ids]
            positions = choose_words(candidate_BL, continues_BL, num_B, candidate_keys)
        else:
            positions = choose_tokens(candidate_BL, num_B, candidate_keys)

        flat_ids = input_ids.reshape(-1)
        labels = flat_ids[positions]
        row, column = np.divmod(positions, L)
        mask_bits, keep_bits, word_bits = (
            draw(settings.keys(stream, starts)[row], column) for stream in (STREAM_MASK, STREAM_KEEP, STREAM_WORD)
        )
        flat_ids[positions] = replacements(
            labels, mask_bits, keep_bits, word_bits, special["[MASK]"], len(self.split.vocabulary)
        )
        return {
            "input_ids": input_ids,
            "token_type_ids": ((column_L > first_sep_B1) & (column_L <= last_sep_B1)).astype(np.int8),
            "lengths": segments.lengths.astype(np.int32),
            "masked_positions": positions,
            "masked_labels": labels,
            "next_sentence_labels": segments.is_random.astype(np.int64),
        }

    def _settings(self, epoch: int) -> PackingSettings:
        return PackingSettings(self.seed, epoch, self.sequence_length, self.short_sequence_prob)

    def _epoch_starts(self, epoch: int) -> Int64:
        if epoch not in self._starts:
            if epoch < 0:
                raise ValueError(f"epoch must be at least 0, got {epoch}")
            self._starts[epoch] = epoch_starts(self.split, self._settings(epoch))
            while len(self._starts) > _CACHED_EPOCHS:
                self._starts.popitem(last=False)
        return self._starts[epoch]
