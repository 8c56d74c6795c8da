"""Keyed dropout: the same mask for a token in whatever batch, at the right rate, with no pattern one can see.

Guards against masks that depend on how a batch is cut into micro-batches and ranks, and against a hash that drops
neighbours, rows or layers together.
"""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from largebatch.models import BertConfig, BertForPreTraining, BertForSequenceClassification, keyed_attention
from largebatch.models.dropout import Dropout, keep_bits, keyed_dropout, row_keys
from largebatch.models.layout import TokenLayout, self_attention
from largebatch.models.vision import LeNet

KEYS = torch.tensor([3, -5, 2**40, -(2**40), 77])


@pytest.fixture
def model(small_config: BertConfig) -> BertForPreTraining:
    dropping = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    return BertForPreTraining(BertConfig.from_hf(small_config.to_hf() | dropping)).double()


def token_rows(num_samples: int, length: int) -> torch.Tensor:
    positions = torch.arange(length).expand(num_samples, -1)
    return row_keys(torch.arange(num_samples)[:, None].expand(-1, length), positions).view(-1, 1)


@pytest.mark.parametrize("prob", [0.1, 0.5, 0.01])
def test_rate_and_scale(prob: float) -> None:
    bits, scale = keep_bits(token_rows(64, 128), 0, 127, 1 - prob)
    # A mean of n draws is off by sqrt(p (1 - p) / n); 4 of that, and half a step of the 2^-16 grid.
    tolerance = 4 * (prob * (1 - prob) / bits.numel()) ** 0.5 + 2**-17
    mask = bits.bool()
    assert mask.double().mean().item() == pytest.approx(1 - prob, abs=tolerance)
    assert scale == pytest.approx(1 / (1 - prob), rel=2**-15)


def test_no_two_neighbours_are_alike() -> None:
    """Columns, positions, samples and sites next to each other: correlations within 5 / sqrt(n) of zero."""
    keys = token_rows(64, 64)
    mask = (keep_bits(keys, 0, 64, 0.5)[0].bool().double() - 0.5).view(64, 64, 64)
    other_site = (keep_bits(keys, 1, 64, 0.5)[0].bool().double() - 0.5).view(64, 64, 64)
    pairs = [(mask, other_site)]
    pairs += [
        (mask.narrow(dim, 0, 64 - lag), mask.narrow(dim, lag, 64 - lag)) for dim in range(3) for lag in (1, 2, 32)
    ]
    for one, other in pairs:
        assert abs((one * other).mean() / 0.25) < 5 / one.numel() ** 0.5
    for dim in range(3):  # and no slice has a rate of its own: the worst of 64 means of 4,096 draws
        others = tuple({0, 1, 2} - {dim})
        assert mask.mean(others).abs().max() < 5 * 0.5 / 4096**0.5


def test_gradient_goes_through_the_same_mask() -> None:
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    keys = token_rows(2, 3)
    assert torch.autograd.gradcheck(lambda x: keyed_dropout(x, keys, 3, 0.5), x)


def test_padding_and_company_change_nothing(model: BertForPreTraining, make_batch: Callable) -> None:
    """In float64, to its rounding: every dropout of the model on, packed or padded, together or in pieces."""
    batch = make_batch([9, 9, 4, 17, 9], 17)
    names = ("input_ids", "token_type_ids", "attention_mask")
    masked = torch.zeros(0, dtype=torch.int64)

    def pooled(rows: slice, keys: torch.Tensor | None = KEYS) -> torch.Tensor:
        return model(*(batch[name][rows] for name in names), masked, None if keys is None else keys[rows])[1]

    together = pooled(slice(None))
    assert torch.equal(pooled(slice(None)), together)  # no generator has a part in it
    apart = torch.cat([pooled(slice(0, 2)), pooled(slice(2, 5))])
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-12)
    model.bert.unpad = False
    torch.testing.assert_close(pooled(slice(None)), together, rtol=0, atol=1e-12)
    assert (pooled(slice(None), KEYS + 1) - together).abs().min() > 1e-4  # the companion: the masks do matter
    model.eval()
    assert torch.equal(pooled(slice(None)), pooled(slice(None), None))


def test_every_site_has_a_number_of_its_own(small_config: BertConfig) -> None:
    model = BertForSequenceClassification(small_config)
    sites = [part.site for part in model.modules() if isinstance(part, Dropout)]
    assert sites == list(range(2 + 3 * small_config.num_hidden_layers))


def test_lenet() -> None:
    model, images = LeNet(), torch.randn(5, 1, 28, 28)
    together = model(images, KEYS)
    torch.testing.assert_close(torch.cat([model(images[:2], KEYS[:2]), model(images[2:], KEYS[2:])]), together)
    assert not torch.equal(model(images), model(images))


def make_wrapped(width: int) -> nn.Module:
    """Return a layer of another kind than a plain linear one."""
    return nn.Sequential(nn.Linear(width, width))


@pytest.mark.parametrize("make_projection", [lambda width: nn.Linear(width, width), make_wrapped])
@pytest.mark.parametrize("chunk", [1, 800, 1 << 18])
def test_attention_in_chunks_has_the_gradients_of_the_whole(
    chunk: int, make_projection: Callable[[int], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written by hand for the CPU, against autograd on padded matrices of probabilities; in float64, to its rounding.

    Chunks of one sequence, of some of those of 9 tokens (3 heads of 9 x 9 are 243 probabilities), and of all.
    """
    monkeypatch.setattr(keyed_attention, "CHUNK", chunk)
    lengths, heads, width = [9, 9, 4, 9, 17, 9, 1], 3, 6  # an odd number of heads, whose last has no partner
    dropout = Dropout(0.3).train()
    dropout.site = 5
    mask = torch.arange(17) < torch.tensor(lengths)[:, None]
    keys = torch.arange(len(lengths)) * 12345
    unpadded, padded = (TokenLayout(mask, unpad=unpad, dropout_keys=keys) for unpad in (True, False))
    inputs = torch.randn(len(lengths), 17, heads * width, dtype=torch.float64)
    projections = [make_projection(heads * width).double() for _ in range(3)]
    seen = []
    for layout in (unpadded, padded):
        rows = inputs.clone().requires_grad_()
        leaves = [rows, *(parameter for part in projections for parameter in part.parameters())]
        context = layout.pad(self_attention(layout.pack(rows), projections, heads, layout, dropout))
        seen.append([context[mask], *torch.autograd.grad(context[mask].square().sum(), leaves)])
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12 * float(seen[1][1].abs().max()))
    plain = self_attention(unpadded.pack(inputs), projections, heads, unpadded, None)
    assert (unpadded.pad(plain)[mask] - seen[0][0]).abs().max() > 0.1, "dropout is off"
