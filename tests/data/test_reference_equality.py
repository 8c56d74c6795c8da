"""The vectorised instances are the published procedure: field by field equal to the token-by-token reference.

Guards: off-by-one sentences, put-back, truncation sides, candidate sets, the ties of whole-word masking. Both read
the same named random numbers, so equality is exact; that the numbers act is shown by the instances of two seeds
differing and by the corpora below exercising every branch (asserted).
"""

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from largebatch.data import CorpusSplit, PretrainingInstances, Vocabulary
from largebatch.data import packing as packing_module
from largebatch.data.reference_instances import ReferenceInstance, reference_epoch


def as_reference(batch: dict[str, np.ndarray]) -> list[ReferenceInstance]:
    B, L = batch["input_ids"].shape
    rows, columns = np.divmod(batch["masked_positions"], L)
    return [
        ReferenceInstance(
            batch["input_ids"][b, : batch["lengths"][b]].tolist(),
            batch["token_type_ids"][b, : batch["lengths"][b]].tolist(),
            columns[rows == b].tolist(),
            batch["masked_labels"][rows == b].tolist(),
            bool(batch["next_sentence_labels"][b]),
        )
        for b in range(B)
    ]


def assert_equal(
    split: CorpusSplit, documents: list[list[list[int]]], sequence_length: int, seed: int, epoch: int, **options: object
) -> list[ReferenceInstance]:
    fast = PretrainingInstances(split, sequence_length, seed=seed, **options)  # type: ignore[arg-type]
    batch = fast.batch(epoch, np.arange(fast.num_instances(epoch)))
    options.setdefault("max_predictions", fast.max_predictions)
    slow = reference_epoch(documents, split.vocabulary, sequence_length, seed=seed, epoch=epoch, **options)  # type: ignore[arg-type]
    assert fast.num_instances(epoch) == len(slow)
    for index, (ours, theirs) in enumerate(zip(as_reference(batch), slow, strict=True)):
        assert dataclasses.asdict(ours) == dataclasses.asdict(theirs), f"instance {index}"
    padding = np.arange(sequence_length) >= batch["lengths"][:, None]
    assert (batch["input_ids"][padding] == split.vocabulary.special_ids["[PAD]"]).all()
    assert (batch["token_type_ids"][padding] == 0).all()
    return slow


CORPORA = {
    "many short documents": (600, 6, 12),
    "documents of one sentence": (300, 1, 40),
    "a few long documents": (5, 400, 15),
    "sentences longer than an instance": (20, 6, 400),
    "one document": (1, 50, 12),
    "two documents": (2, 60, 12),
}


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("sequence_length", [5, 16, 64])
@pytest.mark.parametrize("corpus", list(CORPORA))
def test_equals_the_reference(make_split, corpus: str, sequence_length: int, whole_words: bool) -> None:
    split, documents = make_split(*CORPORA[corpus])
    options = {"whole_word_masking": whole_words, "short_sequence_prob": 0.3}
    assert_equal(split, documents, sequence_length, seed=3, epoch=2, **options)


def test_equals_the_reference_with_the_defaults_at_128(make_split) -> None:
    split, documents = make_split(40, 40, 40)
    slow = assert_equal(split, documents, 128, seed=1, epoch=0)
    assert any(instance.is_random_next for instance in slow)
    assert not all(instance.is_random_next for instance in slow)
    assert max(len(instance.input_ids) for instance in slow) == 128
    assert max(len(instance.masked_positions) for instance in slow) == round(0.15 * 128)


def test_another_seed_epoch_or_length_gives_other_instances(make_split) -> None:
    split, documents = make_split(40, 20, 20)
    first = assert_equal(split, documents, 64, seed=1, epoch=0)
    assert first != assert_equal(split, documents, 64, seed=2, epoch=0)
    assert first != assert_equal(split, documents, 64, seed=1, epoch=1)


@pytest.mark.parametrize("block_sentences", [1, 7, 1 << 18])
@pytest.mark.parametrize("min_lockstep", [1, 10, 10**9])
def test_packing_is_the_same_however_it_is_scheduled(make_split, monkeypatch, min_lockstep, block_sentences) -> None:
    """Lock-step over documents and the walk along successors are two ways to the same table."""
    split, _ = make_split(60, 80, 12)
    expected = packing_module.epoch_starts(split, packing_module.PackingSettings(5, 0, 64, 0.1))
    monkeypatch.setattr(packing_module, "_MIN_LOCKSTEP_DOCUMENTS", min_lockstep)
    monkeypatch.setattr(packing_module, "_BLOCK_SENTENCES", block_sentences)
    monkeypatch.setattr(packing_module, "_BLOCK_DOCUMENTS", 25)
    found = packing_module.epoch_starts(split, packing_module.PackingSettings(5, 0, 64, 0.1))
    assert np.array_equal(found, expected)
    assert len(found) > 300


def test_truncated_lengths_equal_the_loop() -> None:
    """All pairs of lengths around every limit, against taking one token at a time."""
    for limit in (2, 3, 8, 13):
        a, b = (grid.ravel() for grid in np.meshgrid(np.arange(1, 40), np.arange(1, 40)))
        kept = packing_module.truncated_lengths(a, b, limit)
        for index, (x, y) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
            while x + y > limit:
                if x > y:
                    x -= 1
                else:
                    y -= 1
            assert (kept[0][index], kept[1][index]) == (x, y)


documents_strategy = st.lists(
    st.lists(st.lists(st.integers(5, 60), min_size=1, max_size=30), min_size=1, max_size=12), min_size=1, max_size=12
)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    documents=documents_strategy,
    sequence_length=st.integers(5, 40),
    seed=st.integers(-(2**70), 2**70),
    masked_lm_prob=st.sampled_from([0.0, 0.15, 0.5, 1.0]),
    max_predictions=st.integers(1, 12),
    whole_words=st.booleans(),
)
def test_equals_the_reference_on_any_corpus(
    documents, sequence_length, seed, masked_lm_prob, max_predictions, whole_words
) -> None:
    tokens = ("[UNK]", "[CLS]", "[MASK]", "[PAD]", "[SEP]")  # ids other than the usual ones
    vocabulary = Vocabulary((*tokens, *(f"##p{i}" if i % 2 else f"w{i}" for i in range(60))))
    split = CorpusSplit.from_documents(documents, vocabulary)
    options = {
        "masked_lm_prob": masked_lm_prob,
        "max_predictions": max_predictions,
        "whole_word_masking": whole_words,
        "short_sequence_prob": 0.5,
    }
    assert_equal(split, documents, sequence_length, seed=seed, epoch=0, **options)
