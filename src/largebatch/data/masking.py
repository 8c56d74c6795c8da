"""Which tokens are predicted, and what stands in their place."""

import numpy as np
from numpy.typing import NDArray

from .counter_rng import U64, below, chance, draw

Int64 = NDArray[np.int64]
_LAST = np.uint64(0xFFFFFFFFFFFFFFFF)
_POSITION_BITS = np.uint64(0xFFFF)


def num_to_predict(lengths: Int64, masked_lm_prob: float, max_predictions: int) -> Int64:
    """min(max_predictions, max(1, round(masked_lm_prob * length))), halves rounded to even, [CLS] and [SEP] counted."""
    wanted = np.maximum(1, np.rint(lengths * masked_lm_prob)).astype(np.int64)
    return np.minimum(np.minimum(wanted, max_predictions), lengths - 3)


def choose_tokens(candidate_BL: NDArray[np.bool_], num_B: Int64, keys_B: U64) -> Int64:
    """The first `num_B` of each row's candidates in random order.

    Candidates are ordered by their random bits, whose lowest 16 give way to the position, so no two are equal.

    Returns:
        int64 [num_B.sum()], flat positions into [B, L], ascending.
    """
    B, L = candidate_BL.shape
    order_BL = _candidate_keys(candidate_BL, keys_B)
    K = int(num_B.max())
    if K < L:
        order_BL = np.partition(order_BL, K - 1, axis=1)[:, :K]
    order_BL.sort(axis=1)
    chosen_BK = np.arange(order_BL.shape[1]) < num_B[:, None]
    flat_BK = (order_BL & _POSITION_BITS).astype(np.int64) + np.arange(B)[:, None] * L
    return np.sort(flat_BK[chosen_BK])


def choose_words(candidate_BL: NDArray[np.bool_], continues_BL: NDArray[np.bool_], num_B: Int64, keys_B: U64) -> Int64:
    """As `choose_tokens`, but whole words: in random order, a word is taken if it still fits, else skipped.

    A piece that continues a word belongs to the candidate before it. As in the published code, that holds across the
    [SEP] too, where truncation has cut B inside a word.
    """
    B, L = candidate_BL.shape
    first_candidate_BL = candidate_BL & (np.cumsum(candidate_BL, axis=1) == 1)
    starts_BL = candidate_BL & (~continues_BL | first_candidate_BL)
    word_BL = np.cumsum(starts_BL, axis=1) - 1
    rows, columns = np.nonzero(candidate_BL)
    word_of = word_BL[rows, columns]
    size_BL = np.bincount(rows * L + word_of, minlength=B * L).reshape(B, L)  # by number of the word in its row

    # Words in random order; `rank` runs over it for all rows at once.
    order_BL = np.sort(_candidate_keys(starts_BL, keys_B), axis=1)
    position_BL = (order_BL & _POSITION_BITS).astype(np.int64) % L
    num_words_B = starts_BL.sum(axis=1)
    ordered_word_BL = np.take_along_axis(word_BL, position_BL, axis=1)
    ordered_size_BL = np.take_along_axis(size_BL, np.maximum(ordered_word_BL, 0), axis=1)
    taken_BL = np.zeros((B, L), dtype=bool)
    room_B = num_B.copy()
    for rank in range(int(num_words_B.max())):
        fits_B = (rank < num_words_B) & (ordered_size_BL[:, rank] <= room_B)
        taken_BL[fits_B, ordered_word_BL[fits_B, rank]] = True
        room_B -= fits_B * ordered_size_BL[:, rank]
        if not room_B.any():
            break
    chosen = taken_BL[rows, word_of]
    return rows[chosen] * L + columns[chosen]


def _candidate_keys(candidate_BL: NDArray[np.bool_], keys_B: U64) -> U64:
    position_L = np.arange(candidate_BL.shape[1])
    bits_BL = draw(keys_B[:, None], position_L[None, :])
    bits_BL &= ~_POSITION_BITS
    bits_BL |= position_L.astype(np.uint64)
    bits_BL[~candidate_BL] = _LAST
    return bits_BL


def replacements(
    original_N: Int64, mask_bits_N: U64, keep_bits_N: U64, word_bits_N: U64, mask_id: int, vocab_size: int
) -> Int64:
    """What the model sees at the predicted positions: 80% [MASK], 10% the token itself, 10% any word piece."""
    random_N = below(word_bits_N, vocab_size)
    unmasked_N = np.where(chance(keep_bits_N, 0.5), original_N, random_N)
    return np.where(chance(mask_bits_N, 0.8), mask_id, unmasked_N)
