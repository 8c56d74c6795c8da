"""The batches of pre-training, read ahead in larger lots: those that were asked for, one by one, and in any cut.

Guards: instances are made for many micro-batches and steps at once. A row given to its neighbour, or masked positions
off by a lot's beginning, would train on noise and show in no loss curve of the first hours.
"""

import dataclasses
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from largebatch.data import SampleStream, dropout_keys
from largebatch.experiments import pretraining, recipes
from largebatch.experiments.config import BertChoice, StageConfig, TextData
from largebatch.experiments.pretraining import PretrainingWorkload, as_micro_batch
from largebatch.experiments.workload import pack


def workload(corpus: Path, batch_size: int, micro_batch_size: int, sharding: str = "ddp") -> PretrainingWorkload:
    stage = StageConfig("seq64", batch_size, 10, sequence_length=64, micro_batch_size=micro_batch_size)
    config = dataclasses.replace(
        recipes.get("bert-tiny"),
        model=BertChoice("tiny"),
        data=TextData(path=str(corpus)),
        stages=(stage,),
        dropout_masks="keyed",
        sharding=sharding,
    )
    return PretrainingWorkload(config)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
@pytest.mark.parametrize(("batch_size", "micro_batch_size"), [(24, 24), (20, 8), (150, 64), (24, 1)])
def test_read_ahead_or_not_the_batches_are_the_same(
    corpus: Path, batch_size: int, micro_batch_size: int, sharding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against instances made for each epoch's rows of each micro-batch; over the end of an epoch, from within one."""
    work = workload(corpus, batch_size, micro_batch_size, sharding)
    instances = work._train[0]
    num = instances.num_instances(0)
    cursor = {"epoch": 0, "position": num - 30}
    monkeypatch.setattr(pretraining, "_READ_AHEAD", 100)
    stream = SampleStream(instances.num_instances, seed=0)
    crossed = False
    for batch in islice(work.batches(0, {"stage": 0, **cursor}), 7):
        pieces, cursor = stream.take(cursor, batch_size)
        crossed |= len(pieces) > 1
        assert batch.cursor == {"stage": 0, **cursor}
        expected = [(epoch, index) for epoch, indices in pieces for index in indices.tolist()]
        assert batch.num_sequences == batch.totals["sequences"] == len(expected) == batch_size
        sizes = [len(each["input_ids"]) for each in batch.micro_batches]
        if sharding == "fsdp":  # all ranks have to make as many passes through the model
            assert set(sizes[:-1]) <= {micro_batch_size}
        else:
            assert all(int(each["attention_mask"].sum()) <= 64 * micro_batch_size for each in batch.micro_batches)
            assert len(sizes) <= -(-batch_size // micro_batch_size)
        tokens = masked = row = 0
        for micro_batch in batch.micro_batches:
            positions, labels = micro_batch["masked_positions"], micro_batch["masked_labels"]
            masked += len(labels)
            for own in range(len(micro_batch["input_ids"])):
                epoch, index = expected[row]
                row += 1
                alone = as_micro_batch(instances.batch(epoch, np.array([index])))
                mine = (positions // 64) == own
                assert torch.equal(positions[mine] - 64 * own, alone["masked_positions"])
                assert torch.equal(labels[mine], alone["masked_labels"])
                for name in ("input_ids", "token_type_ids", "attention_mask", "next_sentence_labels"):
                    assert torch.equal(micro_batch[name][own], alone[name][0]), name
                assert micro_batch["dropout_keys"][own] == dropout_keys(0, epoch, np.array([index]))[0]
                tokens += int(alone["attention_mask"].sum())
        assert (batch.num_tokens, batch.totals["masked"]) == (tokens, masked)
    assert crossed


def test_the_evaluation_is_of_the_whole_split(corpus: Path) -> None:
    """Two kinds of text stand one after the other in a split: the first rows are of one kind."""
    work = workload(corpus, 24, 24)
    work._heldout = work._train
    num = work._train[0].num_instances(0)
    everything = work._train[0].batch(0, np.arange(num))["input_ids"]
    row_of = {row.tobytes(): number for number, row in enumerate(everything)}

    def evaluated(count: int) -> list[int]:
        data = dataclasses.replace(work.config.data, evaluation_sequences=count)
        work.config = dataclasses.replace(work.config, data=data)
        rows = [row for batch in work._heldout_batches(0) for row in batch["input_ids"].numpy().astype(np.int32)]
        return [row_of[row.tobytes()] for row in rows]

    chosen = evaluated(100)
    assert chosen == evaluated(100) == sorted(set(chosen))
    assert len(chosen) == 100 < num / 4
    # The mean of rows uniform over the split, six standard deviations.
    assert abs(np.mean(chosen) - num / 2) < 6 * num / np.sqrt(12 * 100)
    assert evaluated(10**6) == list(range(num))


@pytest.mark.parametrize(
    ("share", "cap", "num_masked", "note"),
    [
        (0.15, None, 10, None),
        (0.4, None, 26, None),
        (0.15, 9, 9, None),
        (0.4, 10, 10, "at most 10 of 64 tokens are predicted in stage seq64, by its max_predictions, not the 40% of"),
    ],
)
def test_the_probe_predicts_as_many_tokens_as_a_batch_can(
    corpus: Path, share: float, cap: int | None, num_masked: int, note: str | None
) -> None:
    config = workload(corpus, 24, 24).config
    data = dataclasses.replace(config.data, masked_lm_probability=share)
    stage = dataclasses.replace(config.stages[0], max_predictions=cap)
    work = PretrainingWorkload(dataclasses.replace(config, data=data, stages=(stage,)))
    assert len(work.probe_batch(0, 3)["masked_labels"]) == 3 * num_masked
    counts = [np.bincount(part["masked_positions"] // 64) for part in next(work.batches(0, None)).micro_batches]
    assert max(map(max, counts)) == num_masked
    assert len(work.notes) == (note is not None)
    assert all(line.startswith(note) for line in work.notes)


def test_sequences_are_packed_into_the_fewest_micro_batches_that_are_about_equally_full() -> None:
    assert pack(np.array([4, 4, 4, 4]), 16) == [4]
    assert pack(np.array([4, 4, 4, 4]), 15) == [2, 2]  # not 3 and 1
    assert pack(np.array([8, 1, 8, 1]), 9) == [2, 2]
    assert pack(np.array([8, 1, 1, 8]), 9) == [2, 2]
    assert pack(np.array([3, 3, 3, 9]), 9) == [3, 1]
    assert pack(np.array([1, 1, 8, 8]), 10) == [3, 1]  # 1, 1 | 8, 8 would be too full
    rng = np.random.default_rng(0)
    for _ in range(300):
        lengths = rng.integers(1, 129, rng.integers(1, 60))
        room = int(rng.integers(128, 1024))
        sizes = pack(lengths, room)
        parts = np.split(lengths, np.cumsum(sizes)[:-1])
        assert sum(sizes) == len(lengths)
        assert all(0 < part.sum() <= room for part in parts)
        fewest, left = 1, room
        for length in lengths.tolist():
            fewest, left = (fewest, left - length) if length <= left else (fewest + 1, room - length)
        assert len(sizes) == fewest
