"""Accuracy over a set of images is the same however it is cut, and counts every image.

Guards: the last, smaller batch dropped or weighing as much as a full one, and dropout left on.
"""

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from largebatch.data.vision import ImageDataset
from largebatch.errors import UserError
from largebatch.evaluate import evaluate_classification
from largebatch.models import classification_loss


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 10))


@pytest.fixture
def dataset() -> ImageDataset:
    return ImageDataset(images=torch.randn(101, 1, 4, 4), labels=torch.randint(10, (101,)))


def as_is(dataset: ImageDataset) -> Any:
    return dataset


def as_pair(dataset: ImageDataset) -> Any:
    return dataset.images, dataset.labels


def as_micro_batches(dataset: ImageDataset) -> Any:
    """As a generator, of unequal sizes."""
    bounds = [0, 1, 40, 100, 101]
    return ({"images": dataset.images[a:b], "labels": dataset.labels[a:b]} for a, b in itertools.pairwise(bounds))


@pytest.mark.parametrize("form", [as_is, as_pair, as_micro_batches])
@pytest.mark.parametrize("batch_size", [1, 10, 101, 1000])
def test_equals_the_direct_means(model: nn.Module, dataset: ImageDataset, form: Any, batch_size: int) -> None:
    """1e-6 relative: fp32 matrix products of other shapes."""
    logits = model.eval()(dataset.images).detach()
    loss = torch.nn.functional.cross_entropy(logits.double(), dataset.labels)
    model.train()
    result = evaluate_classification(model, form(dataset), classification_loss, batch_size=batch_size)
    assert result == {
        "loss": pytest.approx(float(loss), rel=1e-6),
        "accuracy": pytest.approx(float((logits.argmax(-1) == dataset.labels).double().mean())),
        "samples": 101,
    }
    assert 0 < result["accuracy"] < 1
    assert model.training


def test_all_right_and_all_wrong(model: nn.Module, dataset: ImageDataset) -> None:
    best = model.eval()(dataset.images).argmax(-1)
    for labels, accuracy in ((best, 1.0), ((best + 1) % 10, 0.0)):
        assert evaluate_classification(model, (dataset.images, labels), classification_loss)["accuracy"] == accuracy


def test_wrong_arguments(model: nn.Module, dataset: ImageDataset) -> None:
    with pytest.raises(UserError, match="no samples to evaluate; check"):
        evaluate_classification(model, (dataset.images[:0], dataset.labels[:0]), classification_loss)
    with pytest.raises(ValueError, match="one label for each image, got 101 images and 100 labels"):
        evaluate_classification(model, (dataset.images, dataset.labels[1:]), classification_loss)
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        evaluate_classification(model, dataset, classification_loss, batch_size=0)
