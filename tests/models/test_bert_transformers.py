"""Our BERT is transformers' BERT: the same names, and on the same weights the same outputs and gradients.

Guards the exchange of checkpoints. Tolerance 1e-5 in fp32: hidden states are of order 1 after each LayerNorm, a product
of width 100 is off by about 10 * 6e-8, and three layers with some ten products each add up to a few 1e-6. Padding is
compared nowhere: transformers computes values there, we do not.
"""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from largebatch.models import (
    BertConfig,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    classification_loss,
    pretraining_loss,
)
from largebatch.models.config import ACTIVATIONS

transformers = pytest.importorskip("transformers")

LENGTHS = [(17, 5, 31, 1, 31, 8), (16, 16, 16)]
TOLERANCE = 1e-5


def twins(cls: type[nn.Module], config: BertConfig) -> tuple[nn.Module, nn.Module]:
    """Our model and transformers', with transformers' weights; both loads are strict."""
    ours = cls(config)
    theirs = getattr(transformers, cls.__name__)(transformers.BertConfig(**ours.config.to_hf()))
    # transformers starts all biases at 0 and all gains at 1; a mix-up of those would not show
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    if cls is BertForPreTraining and not config.tie_word_embeddings:
        # untied, transformers keeps a second bias of the head that it never uses
        theirs.cls.predictions.bias = theirs.cls.predictions.decoder.bias
    return ours, theirs


def inputs(batch: dict) -> dict:
    return {
        "input_ids": batch["input_ids"],
        "token_type_ids": batch["token_type_ids"],
        "attention_mask": batch["attention_mask"].long(),
    }


@pytest.mark.parametrize(
    "cls", [BertModel, BertForPreTraining, BertForQuestionAnswering, BertForSequenceClassification]
)
def test_parameters_have_the_same_names_order_and_shapes(cls: type[nn.Module], small_config: BertConfig) -> None:
    ours, theirs = twins(cls, small_config)
    shapes = [[(name, p.shape) for name, p in model.named_parameters()] for model in (ours, theirs)]
    assert sorted(shapes[0]) == sorted(shapes[1])


@pytest.mark.parametrize("unpad", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_encoder(lengths: tuple[int, ...], unpad: bool, small_config: BertConfig, make_batch: Callable) -> None:
    ours, theirs = twins(BertModel, small_config)
    ours.unpad = unpad
    batch = make_batch(lengths, 40)
    mask = batch["attention_mask"]
    hidden, pooled = ours(batch["input_ids"], batch["token_type_ids"], mask)
    expected = theirs(**inputs(batch))
    assert expected.last_hidden_state[mask].std() > 0.5
    torch.testing.assert_close(hidden[mask], expected.last_hidden_state[mask], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(pooled, expected.pooler_output, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("hidden_act", ACTIVATIONS)
def test_every_activation(hidden_act: str, small_config: BertConfig, make_batch: Callable) -> None:
    config = BertConfig.from_hf(small_config.to_hf() | {"hidden_act": hidden_act})
    ours, theirs = twins(BertForPreTraining, config)
    batch = make_batch((9, 4))
    logits, _ = ours(*(batch[n] for n in ("input_ids", "token_type_ids", "attention_mask", "masked_positions")))
    expected = theirs(**inputs(batch)).prediction_logits.flatten(0, 1)[batch["masked_positions"]]
    # Logits are sums of 48 products of order 1 and 0.15, of order 1 to 5: hence relative as well
    torch.testing.assert_close(logits, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_pretraining_heads_and_gradients(
    lengths: tuple[int, ...],
    tied: bool,
    small_config: BertConfig,
    make_batch: Callable,
    assert_same_gradients: Callable,
) -> None:
    ours, theirs = twins(BertForPreTraining, BertConfig.from_hf(small_config.to_hf() | {"tie_word_embeddings": tied}))
    batch = make_batch(lengths, 40)
    logits, nsp_logits = ours(
        batch["input_ids"], batch["token_type_ids"], batch["attention_mask"], batch["masked_positions"]
    )
    labels = torch.full(batch["input_ids"].shape, -100)
    labels.view(-1)[batch["masked_positions"]] = batch["masked_labels"]
    expected = theirs(**inputs(batch), labels=labels, next_sentence_label=batch["next_sentence_labels"])
    theirs_at_masked = expected.prediction_logits.flatten(0, 1)[batch["masked_positions"]]
    torch.testing.assert_close(logits, theirs_at_masked, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(nsp_logits, expected.seq_relationship_logits, rtol=TOLERANCE, atol=TOLERANCE)

    totals = {"masked": torch.tensor(len(batch["masked_labels"])), "sequences": torch.tensor(len(lengths))}
    loss, _ = pretraining_loss(ours, batch, totals)
    torch.testing.assert_close(loss, expected.loss, rtol=TOLERANCE, atol=0)
    loss.backward()
    expected.loss.backward()
    # transformers gives the [PAD] embedding no gradient from the input (padding_idx): id 0 is in no batch here
    assert_same_gradients(ours, theirs, TOLERANCE)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_question_answering_head_and_gradients(
    lengths: tuple[int, ...], small_config: BertConfig, make_batch: Callable, assert_same_gradients: Callable
) -> None:
    ours, theirs = twins(BertForQuestionAnswering, small_config)
    batch = make_batch(lengths, 40)
    mask = batch["attention_mask"]
    expected = theirs(**inputs(batch))
    got = ours(batch["input_ids"], batch["token_type_ids"], mask)
    weights = torch.randn(2, int(mask.sum()))  # any function of the logits of real tokens
    for model, sides in ((ours, got), (theirs, (expected.start_logits, expected.end_logits))):
        sum((side[mask] * weight).sum() for side, weight in zip(sides, weights, strict=True)).backward()
        assert model.qa_outputs.weight.grad.abs().max() > 0
    for side, name in zip(got, ("start_logits", "end_logits"), strict=True):
        torch.testing.assert_close(side[mask], getattr(expected, name)[mask], rtol=TOLERANCE, atol=TOLERANCE)
        probabilities = side.softmax(-1)
        assert not probabilities[~mask].any()
    assert_same_gradients(ours, theirs, TOLERANCE)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_classification_head_and_gradients(
    lengths: tuple[int, ...], small_config: BertConfig, make_batch: Callable, assert_same_gradients: Callable
) -> None:
    ours, theirs = twins(BertForSequenceClassification, small_config)
    batch = make_batch(lengths, 40)
    expected = theirs(**inputs(batch), labels=batch["labels"])
    logits = ours(batch["input_ids"], batch["token_type_ids"], batch["attention_mask"])
    torch.testing.assert_close(logits, expected.logits, rtol=TOLERANCE, atol=TOLERANCE)
    text = {name: value for name, value in batch.items() if name in (*inputs(batch), "labels")}
    loss, _ = classification_loss(ours, text, {"sequences": torch.tensor(len(lengths))})
    loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(loss, expected.loss, rtol=TOLERANCE, atol=0)
    assert_same_gradients(ours, theirs, TOLERANCE)


def test_a_change_of_one_weight_shows(small_config: BertConfig, make_batch: Callable) -> None:
    """The companion: the tolerance would see one weight of one layer off by 1%."""
    ours, theirs = twins(BertModel, small_config)
    batch = make_batch((17, 5))
    with torch.no_grad():
        ours.encoder.layer[0].attention.self.key.weight[0].mul_(1.01)
    hidden, _ = ours(batch["input_ids"], batch["token_type_ids"], batch["attention_mask"])
    expected = theirs(**inputs(batch)).last_hidden_state
    assert (hidden - expected)[batch["attention_mask"]].abs().max() > 10 * TOLERANCE
