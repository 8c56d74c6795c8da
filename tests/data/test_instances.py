"""Instances as arrays: types, purity in (seed, epoch, index), and refusals.

Guards: resuming and sharding rely on an index meaning the same instance in any process and beside any others.
"""

import subprocess
import sys

import numpy as np
import pytest

from largebatch.data import CorpusSplit, PretrainingInstances
from largebatch.errors import UserError

SCRIPT = """
import hashlib, sys
import numpy as np
from largebatch.data import CorpusSplit, PretrainingInstances, Vocabulary
from largebatch.data.vocabulary import SPECIAL_TOKENS
vocabulary = Vocabulary((*SPECIAL_TOKENS, *(f"w{i}" for i in range(100))))
sentence = lambda d, s: [5 + (d * 7 + s * 3 + t) % 100 for t in range(1 + (d + s) % 9)]
documents = [[sentence(d, s) for s in range(1 + d % 17)] for d in range(300)]
instances = PretrainingInstances(CorpusSplit.from_documents(documents, vocabulary), 64, seed=5)
batch = instances.batch(3, np.array([7, 400, 12, 7]))
print(hashlib.sha256(b"".join(batch[name].tobytes() for name in sorted(batch))).hexdigest())
"""


def test_shapes_and_types(make_split) -> None:
    split, _ = make_split(50, 20, 20)
    batch = PretrainingInstances(split, 32, seed=0).batch(0, np.arange(40))
    described = {name: (array.dtype.name, array.shape) for name, array in batch.items()}
    num_masked = len(batch["masked_positions"])
    assert described == {
        "input_ids": ("int32", (40, 32)),
        "token_type_ids": ("int8", (40, 32)),
        "lengths": ("int32", (40,)),
        "masked_positions": ("int64", (num_masked,)),
        "masked_labels": ("int32", (num_masked,)),
        "next_sentence_labels": ("int64", (40,)),
    }
    assert (np.diff(batch["masked_positions"]) > 0).all()


@pytest.mark.parametrize("whole_words", [False, True])
def test_an_instance_does_not_depend_on_its_batch(make_split, whole_words: bool) -> None:
    """One by one, in another order, and in a batch made in several parts: the same instances."""
    split, _ = make_split(400, 30, 20)
    instances = PretrainingInstances(split, 128, seed=0, whole_word_masking=whole_words)
    indices = np.random.default_rng(0).permutation(instances.num_instances(1))[:700]
    assert len(indices) == 700  # more than two parts
    whole = instances.batch(1, indices)
    for row in (0, 255, 256, 699):
        single = instances.batch(1, indices[row : row + 1])
        mine = whole["masked_positions"] // 128 == row
        for name in ("input_ids", "token_type_ids", "lengths", "next_sentence_labels"):
            assert np.array_equal(single[name][0], whole[name][row]), name
        assert np.array_equal(single["masked_positions"], whole["masked_positions"][mine] - 128 * row)
        assert np.array_equal(single["masked_labels"], whole["masked_labels"][mine])
    fresh = PretrainingInstances(split, 128, seed=0, whole_word_masking=whole_words)
    for epoch in (5, 4, 3):  # pushes epoch 1 out of the table
        fresh.num_instances(epoch)
    again = fresh.batch(1, indices[::-1])
    assert np.array_equal(again["input_ids"][::-1], whole["input_ids"])


def test_another_process_makes_the_same_instance() -> None:
    """Also pinned to a digest: the instances are part of a run's identity and must not change between versions."""
    digests = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for hash_seed in ("1", "2")
    }
    assert digests == {"09d6671ff2282993cdc7508b006b8407f3d64cbdd4dc8fa9216ef21f41cc4e1f"}


def test_epochs_differ_in_number_packing_and_masks(make_split) -> None:
    split, _ = make_split(300, 30, 20)
    instances = PretrainingInstances(split, 64, seed=0)
    first, second = (instances.batch(epoch, np.arange(100)) for epoch in (0, 1))
    assert not np.array_equal(first["input_ids"], second["input_ids"])
    assert len({instances.num_instances(epoch) for epoch in range(5)}) > 1


def test_no_index_gives_an_empty_batch(make_split) -> None:
    split, _ = make_split(5, 5, 5)
    for whole_words in (False, True):
        instances = PretrainingInstances(split, 16, seed=0, whole_word_masking=whole_words)
        batch = instances.batch(0, np.zeros(0, dtype=np.int64))
        assert {name: len(array) for name, array in batch.items()} == dict.fromkeys(batch, 0)


@pytest.mark.parametrize(
    ("sequence_length", "share", "expected"),
    [(128, 0.15, 20), (512, 0.15, 77), (64, 0.15, 10), (5, 0.15, 1), (128, 0.4, 51), (512, 0.3, 154)],
)
def test_default_max_predictions(make_split, sequence_length: int, share: float, expected: int) -> None:
    split, _ = make_split(2, 2, 2)
    instances = PretrainingInstances(split, sequence_length, seed=0, masked_lm_prob=share)
    assert instances.max_predictions == expected


def test_the_share_asked_for_is_predicted(make_split) -> None:
    split, _ = make_split(200, 30, 20)
    instances = PretrainingInstances(split, 128, seed=0, masked_lm_prob=0.4)
    batch = instances.batch(0, np.arange(300))
    assert len(batch["masked_labels"]) == np.rint(0.4 * batch["lengths"]).sum()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 4}, r"sequence_length must lie in \[5, 65535\], got 4"),
        ({"max_predictions": 0}, "max_predictions must be at least 1, got 0"),
        ({"masked_lm_prob": 1.5}, r"masked_lm_prob must lie in \[0, 1\], got 1.5"),
        ({"short_sequence_prob": -0.1}, r"short_sequence_prob must lie in \[0, 1\], got -0.1"),
    ],
)
def test_arguments_out_of_range(make_split, options: dict, message: str) -> None:
    split, _ = make_split(2, 2, 2)
    with pytest.raises(ValueError, match=message):
        PretrainingInstances(split, **({"sequence_length": 128, "seed": 0} | options))


@pytest.mark.parametrize("index", [-1, 10**9])
def test_index_out_of_range(make_split, index: int) -> None:
    split, _ = make_split(5, 5, 5)
    with pytest.raises(IndexError, match="epoch 0 has instances 0 to"):
        PretrainingInstances(split, 16, seed=0).batch(0, np.array([0, index]))


def test_empty_split(vocabulary) -> None:
    with pytest.raises(UserError, match="'heldout' is empty"):
        PretrainingInstances(CorpusSplit.from_documents([[]], vocabulary, "heldout"), 16, seed=0)


def test_tokens_in_several_shards_are_the_same(make_split, vocabulary) -> None:
    split, _ = make_split(60, 20, 20)
    (tokens,) = split.tokens()
    bounds = split.sentence_offsets[split.document_offsets[[20, 21, 45]]]
    shards = np.split(tokens, bounds)
    assert len(shards) == 4
    sharded = CorpusSplit("train", shards, split.sentence_offsets, split.document_offsets, vocabulary)
    one, other = (PretrainingInstances(s, 64, seed=0).batch(0, np.arange(100)) for s in (split, sharded))
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert all(
        np.array_equal(a, b)
        for index in (0, 19, 20, 21, 44, 45, 59)
        for a, b in zip(split.document(index), sharded.document(index), strict=True)
    )
