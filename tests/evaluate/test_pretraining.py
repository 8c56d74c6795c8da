"""Masked-word and next-sentence figures are means over all tokens and sequences, however the text is cut.

Guards: a mean of batch means (wrong as soon as batches differ in size), dropout left on, and 0/0 on empty text.
"""

import math

import pytest
import torch
from torch import Tensor

from largebatch.errors import UserError
from largebatch.evaluate import evaluate_pretraining
from largebatch.models import BertConfig, BertForPreTraining, pretraining_loss
from largebatch.train import MicroBatch

LENGTH, VOCABULARY = 12, 50


@pytest.fixture(scope="module")
def model() -> BertForPreTraining:
    torch.manual_seed(0)
    config = BertConfig.named("tiny", vocab_size=VOCABULARY, num_hidden_layers=1, initializer_range=0.5)
    return BertForPreTraining(config)


def instances(num: int) -> list[MicroBatch]:
    """One sequence each, the first with no masked token, the others with ever more."""
    generator = torch.Generator().manual_seed(1)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    return [
        {
            "input_ids": draw(VOCABULARY, 1, LENGTH),
            "token_type_ids": draw(2, 1, LENGTH),
            "attention_mask": torch.arange(LENGTH)[None] < LENGTH - index % 4,
            "masked_positions": torch.arange(index % 7),
            "masked_labels": draw(VOCABULARY, index % 7),
            "next_sentence_labels": draw(2, 1),
        }
        for index in range(num)
    ]


def joined(parts: list[MicroBatch]) -> MicroBatch:
    batch = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    rows = [part["masked_positions"] + LENGTH * index for index, part in enumerate(parts)]
    return batch | {"masked_positions": torch.cat(rows)}


@pytest.mark.parametrize("cuts", [[30], [1, 29], [7, 1, 15, 7], [1] * 30])
def test_any_cut_gives_the_direct_means(model: BertForPreTraining, cuts: list[int]) -> None:
    """1e-6 relative: fp32 cross-entropies, whose matrix products differ in the last bits from shape to shape."""
    singles = instances(30)
    whole = joined(singles)
    model.eval()
    with torch.no_grad():
        mlm, nsp = model(*(whole[n] for n in ("input_ids", "token_type_ids", "attention_mask", "masked_positions")))
    mlm_losses = torch.nn.functional.cross_entropy(mlm.double(), whole["masked_labels"], reduction="none")
    nsp_losses = torch.nn.functional.cross_entropy(nsp.double(), whole["next_sentence_labels"], reduction="none")

    starts = [sum(cuts[:index]) for index in range(len(cuts))]
    batches = [joined(singles[start : start + size]) for start, size in zip(starts, cuts, strict=True)]
    result = evaluate_pretraining(model, iter(batches), pretraining_loss)
    assert result == {
        "mlm_loss": pytest.approx(float(mlm_losses.mean()), rel=1e-6),
        "mlm_accuracy": pytest.approx(float((mlm.argmax(-1) == whole["masked_labels"]).double().mean())),
        "nsp_loss": pytest.approx(float(nsp_losses.mean()), rel=1e-6),
        "nsp_accuracy": pytest.approx(float((nsp.argmax(-1) == whole["next_sentence_labels"]).double().mean())),
        "masked_tokens": len(mlm_losses),
        "sequences": 30,
    }
    if cuts == [1] * 30:  # where a mean of batch means is another number
        means = [float(losses.mean()) for losses in mlm_losses.split([i % 7 for i in range(30)]) if len(losses)]
        assert abs(sum(means) / len(means) - result["mlm_loss"]) > 0.01


def test_dropout_is_off_and_the_model_left_as_it_came(model: BertForPreTraining) -> None:
    batches = instances(8)
    model.eval()
    expected = evaluate_pretraining(model, batches, pretraining_loss)
    model.train()
    model.bert.embeddings.eval()
    model.zero_grad()
    assert evaluate_pretraining(model, batches, pretraining_loss) == expected
    assert model.training
    assert model.cls.training
    assert not model.bert.embeddings.training
    assert all(parameter.grad is None for parameter in model.parameters())
    model.train()
    with torch.no_grad():  # with dropout the loss is another
        one = torch.ones(())
        _, metrics = pretraining_loss(model, joined(batches), {"masked": one, "sequences": one})
    assert abs(float(metrics["mlm_loss"]) / expected["masked_tokens"] - expected["mlm_loss"]) > 1e-3


def test_the_mode_comes_back_after_an_error(model: BertForPreTraining) -> None:
    model.train()
    with pytest.raises(KeyError):
        evaluate_pretraining(model, [{"input_ids": torch.zeros(1, 4, dtype=torch.int64)}], pretraining_loss)
    assert model.training
    assert torch.is_grad_enabled()


def test_mixed_precision_is_near(model: BertForPreTraining) -> None:
    exact = evaluate_pretraining(model, instances(8), pretraining_loss)
    rounded = evaluate_pretraining(model, instances(8), pretraining_loss, autocast="bf16")
    difference = abs(exact["mlm_loss"] - rounded["mlm_loss"])
    assert 0 < difference < 0.05 * exact["mlm_loss"]
    with pytest.raises(ValueError, match="autocast must be"):
        evaluate_pretraining(model, instances(8), pretraining_loss, autocast="fp8")


@pytest.mark.parametrize("num", [0, 1])
def test_nothing_to_measure_is_one_clear_line(model: BertForPreTraining, num: int) -> None:
    """No sequences at all, or a single one without a masked token: no NaN, which JSON cannot hold."""
    with pytest.raises(UserError, match=r"no training instances; hold out a larger part"):
        evaluate_pretraining(model, instances(num), pretraining_loss)


def test_a_new_model_is_near_chance() -> None:
    """log V and log 2: with initial weights of 0.02 the logits differ by about 0.2, hence 5%."""
    fresh = BertForPreTraining(BertConfig.named("tiny", vocab_size=VOCABULARY, num_hidden_layers=1))
    result = evaluate_pretraining(fresh, instances(40), pretraining_loss)
    assert result["mlm_loss"] == pytest.approx(math.log(VOCABULARY), rel=0.05)
    assert result["nsp_loss"] == pytest.approx(math.log(2), rel=0.05)
