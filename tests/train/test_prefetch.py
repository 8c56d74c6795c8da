"""The prefetching thread: order kept, errors in their place, and gone when it is no longer wanted."""

import itertools
import threading

import pytest

from largebatch.train.prefetch import prefetch


def test_the_order_is_kept():
    assert list(prefetch(iter(range(100)))) == list(range(100))


def test_an_error_comes_after_the_items_before_it():
    def items():
        yield from range(3)
        raise ValueError("broken")

    stream = prefetch(items())
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="broken"):
        next(stream)


def test_it_runs_ahead_by_no_more_than_its_depth():
    made = []

    def items():
        for i in itertools.count():
            made.append(i)
            yield i

    stream = prefetch(items(), depth=2)
    next(stream)
    # One with the consumer, two queued, one in the hands of the thread, one being made.
    assert len(made) <= 5
    stream.close()


def test_closing_ends_the_thread():
    before = threading.active_count()
    stream = prefetch(itertools.count())
    next(stream)
    assert threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before
