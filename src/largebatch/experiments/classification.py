"""Image classification as a workload: the same engine, checkpoints and report as BERT's."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from largebatch.data import SampleStream, dropout_keys
from largebatch.data.vision import FASHION_MNIST_PIXELS, MNIST_PIXELS, load_idx_dataset
from largebatch.errors import UserError
from largebatch.evaluate.classification import evaluate_classification
from largebatch.experiments.config import ClassificationConfig
from largebatch.experiments.workload import cut, rank_share
from largebatch.models import classification_loss
from largebatch.models.flops import lenet_training_flops
from largebatch.models.vision import LeNet
from largebatch.train import GlobalBatch, MicroBatch, distributed

# The data sets in MNIST's format that `data.dataset` can name: mean and deviation of their training pixels.
PIXELS = {"mnist": MNIST_PIXELS, "fashion-mnist": FASHION_MNIST_PIXELS}


class ClassificationWorkload:
    """Fulfils `Workload` for a `ClassificationConfig`.

    Raises:
        UserError: the images are missing, damaged or of another size, or the model or data set is not known.
    """

    def __init__(self, config: ClassificationConfig) -> None:
        if config.model != "lenet":
            raise UserError(f"model is {config.model!r}; known is lenet")
        if config.data.dataset not in PIXELS:
            raise UserError(f"data.dataset is {config.data.dataset!r}; known are {', '.join(PIXELS)}")
        if not config.data.path:
            raise UserError(f"no folder with {config.data.dataset} was given; name it with --data")
        self.config = config
        mean, std = PIXELS[config.data.dataset]
        self._train, self._test = (
            load_idx_dataset(Path(config.data.path), split, mean=mean, std=std) for split in ("train", "test")
        )
        for split, dataset in (("train", self._train), ("test", self._test)):
            if dataset.images.shape[-2:] != (28, 28):
                size = "x".join(map(str, dataset.images.shape[-2:]))
                raise UserError(f"{config.data.path} holds {split} images of {size} pixels; lenet reads 28x28")
        self.micro_batch_sizes = [stage.micro_batch_size or 0 for stage in config.stages]
        self.details = {"train_images": len(self._train), "test_images": len(self._test)}
        self.details |= {"train_data": self._train.identity, "test_data": self._test.identity}
        self.baselines: dict[str, float] = {}
        self.notes: list[str] = []

    def model(self) -> nn.Module:
        return LeNet()

    def batches(self, stage: int, cursor: Mapping[str, int] | None) -> Iterator[GlobalBatch]:
        count = len(self._train.labels)
        stream = SampleStream(lambda epoch: count, seed=self.config.seed)
        position = dict(cursor) if cursor is not None else {"epoch": 0, "position": 0}
        share = rank_share(self.config.stages[stage].batch_size, distributed.rank(), distributed.world_size())
        while True:
            pieces, position = stream.take(position, self.config.stages[stage].batch_size)
            rows = torch.cat([torch.from_numpy(indices) for _, indices in pieces])[share]
            samples = {"images": self._train.images[rows], "labels": self._train.labels[rows]}
            if self.config.dropout_masks == "keyed":
                keys = [dropout_keys(self.config.seed, epoch, indices) for epoch, indices in pieces]
                samples["dropout_keys"] = torch.from_numpy(np.concatenate(keys))[share]
            yield GlobalBatch(
                micro_batches=[
                    {name: values[part] for name, values in samples.items()}
                    for part in cut(torch.arange(len(rows)), self.micro_batch_sizes[stage])
                ],
                totals={"sequences": len(rows)},
                num_sequences=len(rows),
                num_tokens=0,
                flops=lenet_training_flops(len(rows)),
                cursor=position,
            )

    def loss(
        self, model: nn.Module, micro_batch: MicroBatch, totals: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return classification_loss(model, micro_batch, totals)

    def probe_batch(self, stage: int, size: int) -> MicroBatch:
        rows = torch.arange(size) % len(self._train.labels)
        return {"images": self._train.images[rows], "labels": self._train.labels[rows]}

    def evaluate(self, model: nn.Module, stage: int, run: Path | None) -> dict[str, Any]:
        return {"split": "test", **evaluate_classification(model, self._test, self.loss)}

    def save_assets(self, run: Path) -> None:
        """Nothing: the configuration says it all."""
