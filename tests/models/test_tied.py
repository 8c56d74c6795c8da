"""A lookup and a decoder with one matrix: the gradient of both together is what autograd sums of two.

Guards against rows that are lost where a word repeats, and against a gradient that is missing where only one of the two
is used.
"""

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from largebatch.models import BertConfig, BertForPreTraining, heads
from largebatch.models.tied import TiedLookup

IDS = torch.tensor([3, 0, 3, 9, 3])


@pytest.mark.parametrize("used", ["both", "lookup", "decoder"])
def test_its_gradient_is_the_sum(used: str) -> None:
    weight, factors = torch.randn(10, 4, dtype=torch.float64), torch.randn(10, 4, dtype=torch.float64)

    def loss(rows: Tensor, decoder: Tensor) -> Tensor:
        of_rows, of_decoder = (rows**2).sum(), (decoder**3 * factors).sum()
        return {"both": of_rows + of_decoder, "lookup": of_rows, "decoder": of_decoder}[used]

    ours, plain = (weight.clone().requires_grad_() for _ in range(2))
    lookup = TiedLookup(ours)
    rows = lookup(IDS)
    assert torch.equal(rows, weight[IDS])
    assert torch.equal(lookup.weight, weight)
    for _ in range(2):  # gradients add up
        lookup = TiedLookup(ours)
        loss(lookup(IDS), lookup.weight).backward()
        loss(F.embedding(IDS, plain), plain).backward()
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("used", [[0], [1], [0, 1]])
def test_a_models_gradients_are_those_without_it(
    used: list[int],
    is_tied: bool,
    small_config: BertConfig,
    make_batch: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the masked words' loss, of the next sentence's, and of both."""
    config = dataclasses.replace(small_config, tie_word_embeddings=is_tied)
    model, batch = BertForPreTraining(config), make_batch([9, 4, 17])
    inputs = [batch[name] for name in ("input_ids", "token_type_ids", "attention_mask", "masked_positions")]
    made, gradients = [], []

    class Lookup(TiedLookup):
        def __init__(self, weight: Tensor) -> None:
            super().__init__(weight)
            made.append(self)

    for lookup in (Lookup, lambda weight: None):
        monkeypatch.setattr(heads, "TiedLookup", lookup)
        (of_words, _), sentence = model(*inputs, masked_labels=batch["masked_labels"])
        losses = [of_words, sentence.square().sum()]
        sum(losses[each] for each in used).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert len(made) == is_tied
    assert gradients[0].keys() == gradients[1].keys()
    scale = max(gradient.abs().max() for gradient in gradients[1].values())
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).abs().max() <= 1e-6 * scale, name


def test_a_frozen_matrix_stays_frozen() -> None:
    lookup = TiedLookup(torch.randn(10, 4))
    assert not lookup(IDS).requires_grad
    assert not lookup.weight.requires_grad
