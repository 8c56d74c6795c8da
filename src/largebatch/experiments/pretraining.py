"""BERT pre-training as a workload: a prepared corpus, masked words and next sentences."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from largebatch.data import Corpus, PretrainingInstances, SampleStream, dropout_keys, epoch_order, unigram_entropy
from largebatch.data.masking import num_to_predict
from largebatch.errors import UserError
from largebatch.evaluate.pretraining import evaluate_pretraining
from largebatch.experiments.config import PretrainingConfig
from largebatch.experiments.transfer import copy_tokenizer
from largebatch.experiments.workload import check_range, cut, pack, rank_share
from largebatch.models import (
    BertConfig,
    BertForPreTraining,
    MemoryEstimate,
    pretraining_loss,
    training_flops,
    training_memory,
)
from largebatch.train import GlobalBatch, MicroBatch, distributed

# Sequences per micro-batch in evaluation, where no activations are kept.
_EVALUATION_MICRO_BATCH = 64
# Instances are made for so many sequences at once: 13 us each, and 90 in batches of 32 (one Zen 3 core, 2026-11-21).
_READ_AHEAD = 1024
# Of the tokens asked for; a stage whose cap allows less gets a note. The usual caps allow all: 20 of 128, 80 of 512.
_MUCH_LESS = 0.9


class PretrainingWorkload:
    """Fulfils `Workload` for a `PretrainingConfig`.

    Raises:
        UserError: the corpus is missing or damaged, a stage has no sequence length, or a setting is out of its range.
    """

    def __init__(self, config: PretrainingConfig) -> None:
        if not config.data.path:
            raise UserError("no corpus was given; make one with `largebatch prepare` and name it with --data")
        check_range(config.data, "data.", masked_lm_probability=(0, 1), short_sequence_probability=(0, 1))
        check_range(config.data, "data.", evaluation_sequences=(1, math.inf))
        self.config = config
        self.corpus = Corpus.open(Path(config.data.path))
        self.bert = BertConfig.named(
            config.model.name,
            vocab_size=self.corpus.vocab_size,
            hidden_dropout_prob=config.model.hidden_dropout,
            attention_probs_dropout_prob=config.model.attention_dropout,
        )
        for index, stage in enumerate(config.stages):
            check_range(stage, f"stages.{index}.", sequence_length=(5, math.inf), max_predictions=(1, math.inf))
            if stage.sequence_length is None:
                raise UserError(f"stages.{index}.sequence_length is not set")
            if stage.sequence_length > self.bert.max_position_embeddings:
                raise UserError(
                    f"stages.{index}.sequence_length is {stage.sequence_length}, more than the model's "
                    f"{self.bert.max_position_embeddings} positions"
                )
        self._train = [self._instances("train", index) for index in range(len(config.stages))]
        holds_out = self.corpus.manifest.splits["heldout"]["documents"] > 0
        self._heldout = [
            self._instances("heldout", index) if holds_out else None for index in range(len(config.stages))
        ]
        for stage, instances in zip(config.stages, self._train, strict=True):
            if instances.num_instances(0) == 0:
                raise UserError(f"{config.data.path} holds no training instance of length {stage.sequence_length}")
        self.micro_batch_sizes = [stage.micro_batch_size or 0 for stage in config.stages]
        self.details = {
            "bert": self.bert.to_hf(),
            "vocab_size": self.bert.vocab_size,
            "corpus": self.corpus.identity,
        }
        self.baselines = self._baselines() if holds_out else {}
        share = config.data.masked_lm_probability
        self.notes = [
            f"at most {instances.max_predictions} of {instances.sequence_length} tokens are predicted in stage "
            f"{stage.name}, by its max_predictions, not the {share:.0%} of data.masked_lm_probability"
            for stage, instances in zip(config.stages, self._train, strict=True)
            if instances.max_predictions < _MUCH_LESS * round(share * instances.sequence_length)
        ]

    def _num_masked(self, stage: int) -> int:
        """How many tokens of a sequence without padding are predicted."""
        instances = self._train[stage]
        lengths = np.array([instances.sequence_length])
        return int(num_to_predict(lengths, instances.masked_lm_prob, instances.max_predictions)[0])

    def _baselines(self) -> dict[str, float]:
        """What a model reaches that sees nothing of its input: the evaluation is to be read beside it."""
        labels = np.concatenate(
            [batch["next_sentence_labels"].numpy() for batch in self._heldout_batches(len(self.config.stages) - 1)]
        )
        share = float(labels.mean())
        return {
            "unigram_mlm_loss": unigram_entropy(self.corpus),
            "majority_nsp_accuracy": max(share, 1 - share),
        }

    def model(self) -> nn.Module:
        return BertForPreTraining(self.bert)

    def batches(self, stage: int, cursor: Mapping[str, int] | None) -> Iterator[GlobalBatch]:
        instances = self._train[stage]
        # Each stage walks through the corpus in an order of its own; the cursor belongs to the stage it names.
        stream = SampleStream(instances.num_instances, seed=self.config.seed + stage)
        position = {"epoch": 0, "position": 0}
        if cursor is not None and cursor["stage"] == stage:
            position = {name: cursor[name] for name in position}
        share = rank_share(self.config.stages[stage].batch_size, distributed.rank(), distributed.world_size())
        steps_ahead = max(1, _READ_AHEAD // max(1, share.stop - share.start))
        while True:
            steps: list[tuple[list[np.ndarray], dict[str, int]]] = []
            for _ in range(steps_ahead):
                pieces, position = stream.take(position, self.config.stages[stage].batch_size)
                samples = np.concatenate([np.column_stack([np.full_like(rows, epoch), rows]) for epoch, rows in pieces])
                steps.append((list(cut(samples[share], self._at_once(stage))), {"stage": stage, **position}))
            made = self._read_parts(stage, [part for parts, _ in steps for part in parts])
            for parts, cursor_after in steps:
                yield self._global_batch(stage, parts, made, cursor_after)

    def _at_once(self, stage: int) -> int:
        """The samples of which micro-batches are made together."""
        size = self.micro_batch_sizes[stage]
        return size * max(1, _READ_AHEAD // size)

    def _read_parts(self, stage: int, parts: list[np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """The instances of each part, made for several parts at a time."""
        for group in cut(parts, max(1, _READ_AHEAD // len(parts[0]))):
            yield from _split(self._read(self._train[stage], np.concatenate(group)), [len(part) for part in group])

    def _global_batch(
        self, stage: int, parts: list[np.ndarray], made: Iterator[dict[str, np.ndarray]], cursor: dict[str, int]
    ) -> GlobalBatch:
        """Of the samples of its parts, and of an iterator of which theirs are the next instances."""
        num_tokens, flops = 0, 0.0
        micro_batches: list[MicroBatch] = []
        for part in parts:
            arrays = next(made)
            num_tokens += int(arrays["lengths"].sum())
            flops += training_flops(self.bert, arrays["lengths"], len(arrays["masked_labels"]), whole_layers=False)
            if self.config.dropout_masks == "keyed":
                arrays["dropout_keys"] = self._dropout_keys(stage, part)
            sizes = self._micro_batches_of(stage, arrays["lengths"])
            micro_batches += [as_micro_batch(one) for one in _split(arrays, sizes)]
        return GlobalBatch(
            micro_batches=micro_batches,
            totals={
                "masked": sum(len(micro_batch["masked_labels"]) for micro_batch in micro_batches),
                "sequences": sum(map(len, parts)),
            },
            num_sequences=sum(map(len, parts)),
            num_tokens=num_tokens,
            flops=flops,
            cursor=cursor,
        )

    def _micro_batches_of(self, stage: int, lengths: np.ndarray) -> list[int]:
        """The numbers of sequences of the micro-batches that sequences of these lengths go into, in their order."""
        size, length = self.micro_batch_sizes[stage], self.config.stages[stage].sequence_length
        assert length is not None
        if self.config.sharding != "ddp":  # each pass through the model is one of all ranks together
            return [len(part) for part in cut(lengths, size)]
        return pack(lengths, size * length)

    def _dropout_keys(self, stage: int, samples: np.ndarray) -> np.ndarray:
        epochs, rows = samples.T
        seed = self.config.seed + stage
        return np.concatenate([dropout_keys(seed, int(epoch), rows[epochs == epoch]) for epoch in np.unique(epochs)])

    @staticmethod
    def _read(instances: PretrainingInstances, samples: np.ndarray) -> dict[str, np.ndarray]:
        """The instances of rows (epoch, index); a micro-batch across the end of an epoch is made of two."""
        epochs, rows = samples.T
        return _concatenate([instances.batch(int(epoch), rows[epochs == epoch]) for epoch in np.unique(epochs)])

    def loss(
        self, model: nn.Module, micro_batch: MicroBatch, totals: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return pretraining_loss(model, micro_batch, totals)

    def probe_batch(self, stage: int, size: int) -> MicroBatch:
        length = self.config.stages[stage].sequence_length
        assert length is not None
        masked = (torch.arange(size)[:, None] * length + 1 + torch.arange(self._num_masked(stage))).reshape(-1)
        return {
            "input_ids": torch.full((size, length), self.bert.vocab_size - 1),
            "token_type_ids": torch.zeros(size, length, dtype=torch.int64),
            "attention_mask": torch.ones(size, length, dtype=torch.bool),
            "masked_positions": masked,
            "masked_labels": torch.zeros_like(masked),
            "next_sentence_labels": torch.zeros(size, dtype=torch.int64),
            **({"dropout_keys": torch.arange(size)} if self.config.dropout_masks == "keyed" else {}),
        }

    def memory(self, stage: int, device: torch.device) -> MemoryEstimate:
        """Estimate the peak of a step of this stage on one device that holds the whole model and the optimizer's state.

        Of a micro-batch without padding, the largest there can be.
        """
        length, size = self.config.stages[stage].sequence_length, self.micro_batch_sizes[stage]
        assert length is not None
        return training_memory(
            self.bert,
            size,
            length,
            size * self._num_masked(stage),
            device=device.type,
            precision=self.config.precision.replace("auto", "fp32"),
            state_bytes=4 if self.config.optim.name in ("lars", "sgd") else 8,
            keyed_dropout=self.config.dropout_masks == "keyed",
        )

    def evaluate(self, model: nn.Module, stage: int, run: Path | None) -> dict[str, Any]:
        if self._heldout[stage] is None:
            return {}
        figures = evaluate_pretraining(
            model, self._heldout_batches(stage), self.loss, autocast=self.config.precision.replace("auto", "fp32")
        )
        return {"split": "heldout", **figures}

    def _heldout_batches(self, stage: int) -> Iterator[MicroBatch]:
        """The same held-out instances at every evaluation, spread over the split: its text may be of several kinds."""
        instances = self._heldout[stage]
        assert instances is not None
        num = instances.num_instances(0)
        chosen = epoch_order(instances.seed, 0, num, stop=min(self.config.data.evaluation_sequences, num))
        for rows in cut(np.sort(chosen), _EVALUATION_MICRO_BATCH):
            yield as_micro_batch(instances.batch(0, rows))

    def save_assets(self, run: Path) -> None:
        copy_tokenizer(self.corpus.tokenizer_files, run)

    def _instances(self, split: str, stage: int) -> PretrainingInstances:
        config, data = self.config.stages[stage], self.config.data
        assert config.sequence_length is not None
        return PretrainingInstances(
            self.corpus.split(split),
            config.sequence_length,
            seed=self.config.seed + stage,
            max_predictions=config.max_predictions,
            masked_lm_prob=data.masked_lm_probability,
            short_sequence_prob=data.short_sequence_probability,
            whole_word_masking=data.whole_word_masking,
        )


def as_micro_batch(arrays: dict[str, np.ndarray]) -> MicroBatch:
    """Instances as the model takes them: int64 ids and a mask of the real tokens."""
    micro_batch = {
        name: torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
        for name, array in arrays.items()
        if name != "lengths"
    }
    positions = torch.arange(micro_batch["input_ids"].shape[1])
    micro_batch["attention_mask"] = positions < torch.from_numpy(arrays["lengths"].astype(np.int64))[:, None]
    return micro_batch


def _concatenate(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    if len(parts) == 1:
        return parts[0]
    length = parts[0]["input_ids"].shape[1]
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0] if name != "masked_positions"}
    offsets = np.cumsum([0] + [len(part["input_ids"]) * length for part in parts[:-1]])
    whole["masked_positions"] = np.concatenate(
        [part["masked_positions"] + offset for part, offset in zip(parts, offsets, strict=True)]
    )
    return whole


def _split(arrays: dict[str, np.ndarray], sizes: list[int]) -> Iterator[dict[str, np.ndarray]]:
    """Cut instances into consecutive parts of the given sizes: the reverse of `_concatenate`."""
    length = arrays["input_ids"].shape[1]
    end = masked_end = 0
    for size in sizes:
        start, end = end, end + size
        masked_start, masked_end = masked_end, int(np.searchsorted(arrays["masked_positions"], end * length))
        rows, masked = slice(start, end), slice(masked_start, masked_end)
        part = {name: array[masked if name.startswith("masked_") else rows] for name, array in arrays.items()}
        yield part | {"masked_positions": part["masked_positions"] - start * length}
