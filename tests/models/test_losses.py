"""Losses do not depend on how a global batch is cut up, and nothing is a NaN where there is nothing to count.

Guards the promise that k micro-batches are one batch: fp32 gradients within 1e-6 of the largest, as the parts are
summed in another order and nothing else differs (rounding of 6e-8, accumulated over a dozen products).
"""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from largebatch.models import (
    BertConfig,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    classification_loss,
    pretraining_loss,
    question_answering_loss,
)
from largebatch.models.vision import LeNet

TEXT = ("input_ids", "token_type_ids", "attention_mask")
CASES = [
    (BertForPreTraining, pretraining_loss),
    (BertForQuestionAnswering, question_answering_loss),
    (BertForSequenceClassification, classification_loss),
]


def part_of(batch: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """Some sequences of a batch, with the masked tokens that lie in them."""
    length = batch["input_ids"].shape[1]
    owner = batch["masked_positions"] // length
    inside = (owner >= rows.start) & (owner < rows.stop)
    part = {name: tensor[rows] for name, tensor in batch.items() if not name.startswith("masked")}
    part["masked_positions"] = batch["masked_positions"][inside] - rows.start * length
    part["masked_labels"] = batch["masked_labels"][inside]
    return part


@pytest.mark.parametrize("cuts", [(0, 4, 8), (0, 1, 2, 3, 4, 5, 6, 7, 8), (0, 7, 8)])
@pytest.mark.parametrize(("cls", "loss_function"), CASES)
def test_micro_batches_add_up_to_the_batch(
    cls: type[nn.Module],
    loss_function: Callable,
    cuts: tuple[int, ...],
    small_config: BertConfig,
    make_batch: Callable,
    assert_same_gradients: Callable,
) -> None:
    """The masked tokens are spread unevenly, and some parts have none."""
    whole, parts = cls(small_config), cls(small_config)
    parts.load_state_dict(whole.state_dict())
    batch = make_batch([17, 3, 31, 40, 1, 9, 40, 2])
    batch["masked_positions"] = batch["masked_positions"][(batch["masked_positions"] // 40) != 2][::2]
    batch["masked_labels"] = batch["masked_labels"][: len(batch["masked_positions"])]
    totals = {"masked": torch.tensor(len(batch["masked_labels"])), "sequences": torch.tensor(8)}

    loss, metrics = loss_function(whole, batch, totals)
    loss.backward()
    total, sums = 0.0, dict.fromkeys(metrics, 0.0)
    for start, stop in itertools.pairwise(cuts):
        contribution, part_metrics = loss_function(parts, part_of(batch, slice(start, stop)), totals)
        contribution.backward()
        total += contribution.item()
        for name, value in part_metrics.items():
            assert not value.requires_grad
            sums[name] += value.item()
    assert total == pytest.approx(loss.item(), rel=1e-6)
    for name, value in metrics.items():
        assert sums[name] == pytest.approx(value.item(), rel=1e-6), name
    assert_same_gradients(parts, whole, 1e-6)


def test_means_of_means_would_be_seen(
    small_config: BertConfig, make_batch: Callable, assert_same_gradients: Callable
) -> None:
    """The companion: dividing each micro-batch by its own counts, as is common, misses the tolerance by far."""
    whole, parts = BertForPreTraining(small_config), BertForPreTraining(small_config)
    parts.load_state_dict(whole.state_dict())
    batch = make_batch([17, 3, 31, 40])
    totals = {"masked": torch.tensor(len(batch["masked_labels"])), "sequences": torch.tensor(4)}
    pretraining_loss(whole, batch, totals)[0].backward()
    for rows in (slice(0, 2), slice(2, 4)):
        part = part_of(batch, rows)
        own = {"masked": torch.tensor(len(part["masked_labels"])), "sequences": torch.tensor(2)}
        (pretraining_loss(parts, part, own)[0] / 2).backward()
    with pytest.raises(AssertionError, match="of the largest gradient"):
        assert_same_gradients(parts, whole, 1e-3)


@pytest.mark.parametrize("total_masked", [0, 7])
def test_nothing_masked_is_harmless(total_masked: int, small_config: BertConfig, make_batch: Callable) -> None:
    """In this micro-batch, or in the whole global batch: the head's gradient is zero, the rest is as without it."""
    model = BertForPreTraining(small_config)
    batch = make_batch([5, 9])
    batch["masked_positions"] = batch["masked_labels"] = torch.empty(0, dtype=torch.int64)
    totals = {"masked": torch.tensor(total_masked), "sequences": torch.tensor(2)}
    loss, metrics = pretraining_loss(model, batch, totals)
    loss.backward()
    assert metrics["mlm_loss"] == 0
    assert metrics["mlm_accuracy"] == 0
    assert loss == metrics["nsp_loss"] > 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} takes no part: DistributedDataParallel would wait for it"
        assert parameter.grad.isfinite().all(), name
        if name.startswith("cls.predictions"):
            assert not parameter.grad.any(), name
    assert model.bert.embeddings.word_embeddings.weight.grad.any()


class FixedLogits(nn.Module):
    """Stands for a model: returns what it was given."""

    def __init__(self, *logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, *_: Tensor) -> tuple[Tensor, ...]:
        return self.logits


def test_pretraining_loss_by_hand() -> None:
    """Two masked tokens of a vocabulary of 4, a global batch of 8 of them; one sequence of 2."""
    mlm = torch.tensor([[0.0, 0.0, 0.0, 0.0], [math.log(7), 0.0, 0.0, 0.0]])
    nsp = torch.tensor([[math.log(3), 0.0]])
    batch = dict.fromkeys((*TEXT, "masked_positions"), torch.empty(0))
    batch |= {"masked_labels": torch.tensor([3, 0]), "next_sentence_labels": torch.tensor([1])}
    loss, metrics = pretraining_loss(FixedLogits(mlm, nsp), batch, {"masked": torch.tensor(8), "sequences": 2})
    mlm_loss = (math.log(4) + math.log(10 / 7)) / 8
    nsp_loss = math.log(4) / 2
    assert metrics["mlm_loss"].item() == pytest.approx(mlm_loss)
    assert metrics["nsp_loss"].item() == pytest.approx(nsp_loss)
    assert metrics["mlm_accuracy"].item() == pytest.approx(1 / 8)
    assert metrics["nsp_accuracy"].item() == 0
    assert loss.item() == pytest.approx(mlm_loss + nsp_loss)


def test_question_answering_loss_by_hand() -> None:
    """Uniform logits over 3 places at the start; at the end all on place 2, where the first of 2 answers ends."""
    start = torch.zeros(2, 3)
    end = torch.tensor([[0.0, 0.0, 50.0]] * 2)
    batch = dict.fromkeys(TEXT, torch.empty(0))
    batch |= {"start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([2, 1])}
    loss, metrics = question_answering_loss(FixedLogits(start, end), batch, {"sequences": torch.tensor(2)})
    assert loss.item() == pytest.approx((math.log(3) + (0 + 50) / 2) / 2)
    assert metrics["end_accuracy"].item() == 0.5


@pytest.mark.parametrize("outside", [-1, -100, 3, 511])
def test_an_answer_outside_the_window_is_the_first_token(outside: int) -> None:
    logits = torch.randn(2, 4, 3)
    batch = dict.fromkeys(TEXT, torch.empty(0))
    positions = torch.tensor([1, outside, 2, outside])
    answers = [
        question_answering_loss(
            FixedLogits(*logits), batch | {"start_positions": there, "end_positions": there}, {"sequences": 4}
        )
        for there in (positions, torch.tensor([1, 0, 2, 0]))
    ]
    assert answers[0] == answers[1]


def test_images_are_classified_by_the_same_loss() -> None:
    model = LeNet().eval()
    batch = {"images": torch.randn(3, 1, 28, 28), "labels": torch.tensor([1, 2, 3])}
    loss, metrics = classification_loss(model, batch, {"sequences": torch.tensor(6)})
    expected = nn.functional.cross_entropy(model(batch["images"]), batch["labels"]) / 2
    torch.testing.assert_close(loss, expected)
    assert metrics.keys() == {"accuracy"}


def test_half_precision_logits_are_summed_in_fp32() -> None:
    """A sum of thousands of bf16 losses would stop growing: 256 + 1 is 256 in bf16."""
    logits = torch.zeros(4096, 11, dtype=torch.bfloat16)
    batch = {"images": torch.empty(0), "labels": torch.zeros(4096, dtype=torch.int64)}

    class Model(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return logits

    loss, _ = classification_loss(Model(), batch, {"sequences": torch.tensor(4096)})
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(11), rel=1e-5)
