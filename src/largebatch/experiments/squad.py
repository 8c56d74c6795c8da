"""Question answering as a workload: a pre-trained encoder, SQuAD's format, exact match and F1."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from largebatch.errors import UserError
from largebatch.evaluate import (
    FinetuneSettings,
    SquadDataset,
    SquadFeatures,
    answer_questions,
    read_squad,
    squad_batches,
    squad_features,
    squad_score,
    write_predictions,
)
from largebatch.experiments.config import SquadConfig, SquadData
from largebatch.experiments.transfer import copy_tokenizer, open_encoder
from largebatch.experiments.workload import check_range
from largebatch.models import BertConfig, BertForQuestionAnswering, question_answering_loss, training_flops
from largebatch.train import GlobalBatch, MicroBatch


def windows(data: SquadData, bert: BertConfig) -> dict[str, int]:
    """The lengths of the windows, as `squad_features` takes them.

    Where the model has fewer positions than a window is to have, stride and question are a third of those at most.

    Raises:
        UserError: a window has no room for a question and one token of the text.
    """
    length, stride, query = data.max_sequence_length, data.document_stride, data.max_query_length
    if bert.max_position_embeddings < length:
        length = bert.max_position_embeddings
        stride, query = min(stride, length // 3), min(query, length // 3)
        if length < 5:
            raise UserError(f"the model has max_position_embeddings {length}; question and text need 5 positions")
    if length < query + 4:
        raise UserError(f"data.max_query_length is {query}; in windows of {length} tokens it is at most {length - 4}")
    return {"max_seq_length": length, "doc_stride": stride, "max_query_length": query}


def check_words(features: SquadFeatures, bert: BertConfig, source: Path) -> None:
    """Refuse a tokenizer that is not the model's.

    Raises:
        UserError: it gives a token a number for which the model has no embedding.
    """
    largest = int(features.token_ids.max(initial=0))
    if largest >= bert.vocab_size:
        raise UserError(
            f"{source}: the tokenizer gives a token the number {largest}, but the model has {bert.vocab_size} "
            "embeddings; put the model's own tokenizer there"
        )


class SquadWorkload:
    """Fulfils `Workload` for a `SquadConfig`.

    Raises:
        UserError: encoder or data are missing or damaged, or a setting is out of its range.
    """

    def __init__(self, config: SquadConfig) -> None:
        for name in ("train", "test"):
            if not getattr(config.data, name):
                raise UserError(f"data.{name} is not set; name a file in SQuAD's JSON format")
        if config.data.bad_answers not in ("error", "skip"):
            raise UserError(f"data.bad_answers is {config.data.bad_answers!r}; it must be error or skip")
        if not config.init:
            raise UserError("init is not set; name a run of `largebatch train`, or a folder in Hugging Face's format")
        if not 0 < config.epochs < math.inf:
            raise UserError(f"epochs is {config.epochs}; it must be a number above 0")
        check_range(config.data, "data.", max_sequence_length=(5, math.inf), document_stride=(1, math.inf))
        check_range(config.data, "data.", max_query_length=(1, math.inf))
        for index, stage in enumerate(config.stages):
            check_range(stage, f"stages.{index}.", batch_size=(1, math.inf))
        self._encoder = open_encoder(Path(config.init))
        self.bert = dataclasses.replace(self._encoder.config, labels=None)  # which are another head's
        self._windows = windows(config.data, self.bert)
        self._data = config.data
        self._tokenizer = self._encoder.tokenizer()
        training = [self._read(Path(part)) for part in config.data.train.split(",")]
        self._train_features = self.features([example for dataset in training for example in dataset])
        if not config.data.unanswered_windows:
            self._train_features = self._train_features.answered()
        self._test = self._read(Path(config.data.test))
        self._test_features = self.features(list(self._test))
        self.config = self._with_steps(config)
        self.micro_batch_sizes = [stage.micro_batch_size or 0 for stage in config.stages]
        self.details = {
            "bert": self.bert.to_hf(),
            "train_questions": sum(len(dataset) for dataset in training),
            "train_windows": int(self._train_features.trainable.sum()),
            "test_questions": len(self._test),
            "train_data": [dataset.identity for dataset in training],
            "test_data": self._test.identity,
        }
        self.baselines: dict[str, float] = {}
        self.notes = [str(dataset) for dataset in [*training, self._test] if dataset.bad_answers]
        if self._windows["max_seq_length"] < config.data.max_sequence_length:
            lengths = ", ".join(f"{name} {length}" for name, length in self._windows.items())
            self.notes.append(f"windows cut to the model's {self.bert.max_position_embeddings} positions: {lengths}")
        if config.random_encoder:
            self.notes.append("baseline: the encoder's weights are random")

    def _with_steps(self, config: SquadConfig) -> SquadConfig:
        """Fill in the steps, where the recipe leaves them to the data's size."""
        windows = int(self._train_features.trainable.sum())
        stages = []
        for stage in config.stages:
            if stage.steps == 0:
                settings = FinetuneSettings(batch_size=stage.batch_size, epochs=config.epochs)
                stage = dataclasses.replace(stage, steps=settings.steps(windows))
            stages.append(stage)
        return dataclasses.replace(config, stages=tuple(stages))

    def _read(self, path: Path) -> SquadDataset:
        return read_squad(path, on_bad_answer=self._data.bad_answers)

    def features(self, examples: list[Any]) -> SquadFeatures:
        """The windows of some questions."""
        features = squad_features(examples, self._tokenizer, **self._windows)
        check_words(features, self.bert, self._encoder.folder)
        return features

    def model(self) -> nn.Module:
        model = BertForQuestionAnswering(self.bert)
        if not self.config.random_encoder:
            self._encoder.load_into(model)
        return model

    def batches(self, stage: int, cursor: Mapping[str, int] | None) -> Iterator[GlobalBatch]:
        batches = squad_batches(
            self._train_features,
            batch_size=[stage.batch_size for stage in self.config.stages],
            micro_batch_size=self.micro_batch_sizes[stage],
            seed=self.config.seed,
            flops=lambda lengths: training_flops(self.bert, lengths, 0),
            keyed_dropout=self.config.dropout_masks == "keyed",
        )
        return batches(stage, cursor)

    def loss(
        self, model: nn.Module, micro_batch: MicroBatch, totals: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return question_answering_loss(model, micro_batch, totals)

    def probe_batch(self, stage: int, size: int) -> MicroBatch:
        shape = (size, self._windows["max_seq_length"])
        return {
            "input_ids": torch.full(shape, self.bert.vocab_size - 1),
            "token_type_ids": torch.zeros(shape, dtype=torch.int64),
            "attention_mask": torch.ones(shape, dtype=torch.bool),
            "start_positions": torch.ones(size, dtype=torch.int64),
            "end_positions": torch.ones(size, dtype=torch.int64),
            **({"dropout_keys": torch.arange(size)} if self.config.dropout_masks == "keyed" else {}),
        }

    def evaluate(self, model: nn.Module, stage: int, run: Path | None) -> dict[str, Any]:
        predictions = answer_questions(model, self._test_features)
        if run is not None:
            write_predictions(run / "predictions.json", predictions)
        return {"split": "test", **squad_score(self._test, predictions).metrics()}

    def save_assets(self, run: Path) -> None:
        copy_tokenizer(self._encoder.tokenizer_files, run)
