"""The order in which an epoch's instances are visited, and a cursor that runs through epochs."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from largebatch.errors import UserError

from .counter_rng import below, draw, fold_key

_STREAM_ORDER = 0x0DE5
_STREAM_DROPOUT = 0xD509
# A Feistel network of few values does not reach all permutations alike; sorting random keys does, and is cheap here.
_MAX_SORTED = 1 << 12
_ROUNDS = 8


def epoch_order(seed: int, epoch: int, num: int, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
    """The shuffle of an epoch: positions `start` to `stop` of a permutation of ``range(num)``.

    A large permutation is computed where it is asked for and never stored: a Feistel network over pairs
    (left, right) in [0, a) x [0, a), a = ceil(sqrt(num)), whose rounds add a keyed hash of the other half modulo a;
    a result outside ``range(num)`` is sent through again until it is inside (cycle walking: Black and Rogaway,
    "Ciphers with arbitrary finite domains", CT-RSA 2002). So a batch of an epoch of 10**8 instances costs no more
    than one of a small epoch, resuming in the middle is free, and the order does not depend on the version of numpy.

    Args:
        seed: of the run.
        epoch: counted from 0; every epoch has its own order.
        num: instances in the epoch.
        start, stop: the positions wanted; all of them by default.

    Returns:
        int64 [stop - start], instance indices.
    """
    stop = num if stop is None else stop
    if not 0 <= start <= stop <= num:
        raise ValueError(f"positions {start} to {stop} are not within an epoch of {num} instances")
    if num <= _MAX_SORTED:
        keys = draw(fold_key(_STREAM_ORDER, seed, epoch, num), np.arange(num))
        return np.argsort(keys, kind="stable")[start:stop]
    side = math.isqrt(num - 1) + 1
    round_keys = [fold_key(_STREAM_ORDER, seed, epoch, num, r) for r in range(_ROUNDS)]
    result = np.arange(start, stop, dtype=np.int64)
    pending = np.arange(stop - start)
    values = result.copy()
    while pending.size:
        left, right = np.divmod(values, side)
        for key in round_keys:
            left, right = right, left + below(draw(key, right), side)
            right -= side * (right >= side)
        values = left * side + right
        inside = values < num
        result[pending[inside]] = values[inside]
        pending, values = pending[~inside], values[~inside]
    return result


def dropout_keys(seed: int, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """A key for the dropout masks of each visit to an instance: a function of the seed, the epoch and its index."""
    return draw(fold_key(_STREAM_DROPOUT, seed, epoch), indices).view(np.int64)


class SampleStream:
    """An endless stream of shuffled instances, read through a cursor that can be saved and given back.

    Every rank holds the same stream and takes the same global batch from it; a rank's part is a slice of the
    returned indices, so the samples of a step do not depend on the number of ranks.

    Args:
        num_per_epoch: epoch -> number of instances in it.
        seed: of the shuffle.

    >>> stream = SampleStream(lambda epoch: 5, seed=0)
    >>> pieces, cursor = stream.take({"epoch": 0, "position": 3}, 4)
    >>> [(epoch, len(indices)) for epoch, indices in pieces], cursor
    ([(0, 2), (1, 2)], {'epoch': 1, 'position': 2})
    """

    def __init__(self, num_per_epoch: Callable[[int], int], seed: int) -> None:
        self._num_per_epoch = num_per_epoch
        self._seed = seed

    def take(
        self, cursor: dict[str, int] | None, count: int
    ) -> tuple[list[tuple[int, NDArray[np.int64]]], dict[str, int]]:
        """The next `count` instances after `cursor` (None: from the beginning).

        Returns:
            Pieces ``(epoch, indices)``, more than one where the batch crosses the end of an epoch, and the new cursor.
        """
        epoch, position = (0, 0) if cursor is None else (cursor["epoch"], cursor["position"])
        pieces = []
        while count > 0:
            num = self._num_per_epoch(epoch)
            if num <= 0:
                raise UserError(f"epoch {epoch} holds no training instance: the corpus split is empty")
            if position > num:
                raise UserError(
                    f"the saved position {position} lies beyond epoch {epoch}'s {num} instances: "
                    "the cursor belongs to another corpus, seed or sequence length"
                )
            taken = min(count, num - position)
            if taken:
                pieces.append((epoch, epoch_order(self._seed, epoch, num, position, position + taken)))
            count -= taken
            position += taken
            if position == num:
                epoch, position = epoch + 1, 0
        return pieces, {"epoch": epoch, "position": position}
