"""Without padding the model computes the same as with it, and sequences that share rows never see each other.

Guards the unpadded path, which serves training, against the padded one, which is held against transformers. Tolerance
1e-5 in fp32, as derived there: the two differ in the order of sums alone.
"""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from largebatch.models import (
    BertConfig,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    classification_loss,
    pretraining_loss,
    question_answering_loss,
)
from largebatch.models.dropout import Dropout
from largebatch.models.layout import TokenLayout, _block_attention, _packed_attention, attention

TOLERANCE = 1e-5
LOSSES = {
    BertForPreTraining: pretraining_loss,
    BertForQuestionAnswering: question_answering_loss,
    BertForSequenceClassification: classification_loss,
}
MIXES = [[2], [1, 1, 64], [64, 64], [7, 3, 7, 50, 3, 7], [12, 11, 10, 9]]


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    totals = {"masked": torch.tensor(10), "sequences": torch.tensor(5)}
    return LOSSES[type(model)](model, batch, totals)[0]


def pair(cls: type[nn.Module], config: BertConfig) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    unpadded, padded = cls(config), cls(config, unpad=False)
    padded.load_state_dict(unpadded.state_dict())
    return unpadded, padded


@pytest.mark.parametrize("lengths", MIXES)
@pytest.mark.parametrize("cls", list(LOSSES))
def test_losses_and_gradients_equal_the_padded_path(
    cls: type[nn.Module],
    lengths: list[int],
    small_config: BertConfig,
    make_batch: Callable,
    assert_same_gradients: Callable,
) -> None:
    unpadded, padded = pair(cls, small_config)
    batch = make_batch(lengths, 64)
    losses = [loss_of(model, batch) for model in (unpadded, padded)]
    torch.testing.assert_close(*losses, rtol=TOLERANCE, atol=0)
    for loss in losses:
        loss.backward()
    assert_same_gradients(unpadded, padded, TOLERANCE)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 48), min_size=1, max_size=9), extra=st.integers(0, 9))
def test_any_mix_of_lengths(
    lengths: list[int], extra: int, small_config: BertConfig, make_batch: Callable, assert_same_gradients: Callable
) -> None:
    unpadded, padded = pair(BertForPreTraining, small_config)
    batch = make_batch(lengths, max(lengths) + extra)
    for model in (unpadded, padded):
        loss_of(model, batch).backward()
    assert_same_gradients(unpadded, padded, TOLERANCE)


@pytest.mark.slow
def test_published_width_and_length(make_batch: Callable, assert_same_gradients: Callable) -> None:
    config = BertConfig.named("mini", 211, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    unpadded, padded = pair(BertForPreTraining, config)
    batch = make_batch([512, 1, 300, 17, 511, 2], 512)
    for model in (unpadded, padded):
        loss_of(model, batch).backward()
    assert_same_gradients(unpadded, padded, TOLERANCE)


def test_a_real_token_dropped_as_padding_shows(
    small_config: BertConfig, make_batch: Callable, assert_same_gradients: Callable
) -> None:
    """The companion: with one of 130 tokens taken for padding in one of the two, the tolerance is far exceeded."""
    unpadded, padded = pair(BertForQuestionAnswering, small_config)
    batch = make_batch([64, 3, 63], 64)
    loss_of(unpadded, batch).backward()
    batch["attention_mask"][0, 63] = False
    loss_of(padded, batch).backward()
    with pytest.raises(AssertionError, match="of the largest gradient"):
        assert_same_gradients(unpadded, padded, 100 * TOLERANCE)


def test_outputs_are_in_the_callers_order_and_zero_at_padding(small_config: BertConfig, make_batch: Callable) -> None:
    unpadded, padded = pair(BertModel, small_config)
    batch = make_batch([7, 30, 7, 2], 33)
    mask = batch["attention_mask"]
    hidden, pooled = unpadded(batch["input_ids"], batch["token_type_ids"], mask)
    expected, expected_pooled = padded(batch["input_ids"], batch["token_type_ids"], mask)
    torch.testing.assert_close(hidden[mask], expected[mask], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(pooled, expected_pooled, rtol=0, atol=TOLERANCE)
    assert not hidden[~mask].any()


def test_masked_logits_follow_the_order_of_the_positions(small_config: BertConfig, make_batch: Callable) -> None:
    unpadded, padded = pair(BertForPreTraining, small_config)
    batch = make_batch([7, 30, 7, 2], 33)
    shuffled = batch["masked_positions"][torch.randperm(len(batch["masked_positions"]))]
    positions = torch.cat([shuffled, shuffled[:2]])  # a position may come twice
    first, second = (
        model(batch["input_ids"], batch["token_type_ids"], batch["attention_mask"], positions)[0]
        for model in (unpadded, padded)
    )
    torch.testing.assert_close(first, second, rtol=TOLERANCE, atol=TOLERANCE)


def test_holes_in_the_mask(small_config: BertConfig, make_batch: Callable) -> None:
    """Padding inside a sequence is dropped like any other, and the tokens behind it keep their positions."""
    unpadded, padded = pair(BertModel, small_config)
    batch = make_batch([20, 13], 22)
    mask = batch["attention_mask"]
    mask[0, 3:6] = False
    mask[1, 9] = False
    first, second = (model(batch["input_ids"], batch["token_type_ids"], mask)[0] for model in (unpadded, padded))
    torch.testing.assert_close(first[mask], second[mask], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("unpad", [True, False])
def test_neighbours_never_see_each_other(unpad: bool, small_config: BertConfig, make_batch: Callable) -> None:
    """Change one sequence: the others' outputs, and their gradients, do not move a bit."""
    model = BertForQuestionAnswering(small_config, unpad=unpad)
    batch = make_batch([9, 9, 4, 9, 17])
    others = torch.tensor([0, 2, 3, 4])

    def outputs(ids: Tensor) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        logits = torch.stack(model(ids, batch["token_type_ids"], batch["attention_mask"]))
        logits[:, others].sum().backward()
        return logits.detach(), model.qa_outputs.weight.grad.clone()

    changed = batch["input_ids"].clone()
    changed[1, 3] += 1
    (before, gradient), (after, gradient_after) = outputs(batch["input_ids"]), outputs(changed)
    assert torch.equal(before[:, others], after[:, others])
    assert torch.equal(gradient, gradient_after)
    assert not torch.equal(before[:, 1], after[:, 1])


def test_padded_width_does_not_matter(small_config: BertConfig, make_batch: Callable) -> None:
    """The same sequences in a wider array are the same rows: equal to the bit."""
    model = BertForSequenceClassification(small_config)
    narrow = make_batch([9, 5])
    wide = {name: narrow[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
    wide = {name: nn.functional.pad(tensor, (0, 21)) for name, tensor in wide.items()}
    logits = [model(b["input_ids"], b["token_type_ids"], b["attention_mask"]) for b in (narrow, wide)]
    assert torch.equal(*logits)


def test_same_seed_same_bits_and_dropout_acts(small_config: BertConfig, make_batch: Callable) -> None:
    config = BertConfig.from_hf(
        small_config.to_hf() | {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    )
    model = BertForPreTraining(config)
    batch = make_batch([9, 9, 4, 17])

    def gradient(seed: int) -> Tensor:
        model.zero_grad()
        torch.manual_seed(seed)
        loss_of(model, batch).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    assert torch.equal(gradient(3), gradient(3))
    assert not torch.equal(gradient(3), gradient(4))
    model.eval()
    assert torch.equal(gradient(3), gradient(4))


@pytest.mark.parametrize("name", ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"])
def test_each_dropout_acts(name: str, small_config: BertConfig, make_batch: Callable) -> None:
    model = BertForSequenceClassification(BertConfig.from_hf(small_config.to_hf() | {name: 0.2}))
    batch = make_batch([9, 9, 4, 17])
    first, second = loss_of(model, batch), loss_of(model, batch)
    assert first != second


def test_recomputed_layers_give_the_same_bits(small_config: BertConfig, make_batch: Callable) -> None:
    """Dropout included: the random numbers are replayed."""
    config = BertConfig.from_hf(
        small_config.to_hf() | {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    )
    model = BertForPreTraining(config)
    frugal = BertForPreTraining(config, checkpoint_layers=True)
    frugal.load_state_dict(model.state_dict())
    batch = make_batch([9, 9, 4, 17])
    saved = []
    for one in (model, frugal):
        count = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal count
            count += tensor.numel()
            return tensor

        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = loss_of(one, batch)
        loss.backward()
        saved.append(count)
    for first, second in zip(model.parameters(), frugal.parameters(), strict=True):
        assert torch.equal(first.grad, second.grad)
    assert saved[1] < saved[0] / 2


def test_blocks_are_of_one_length_each() -> None:
    mask = torch.arange(6) < torch.tensor([3, 6, 3, 1])[:, None]
    layout = TokenLayout(mask)
    assert layout.blocks == [(1, 1), (2, 3), (1, 6)]
    assert layout.token_index.tolist() == [18, 0, 1, 2, 12, 13, 14, 6, 7, 8, 9, 10, 11]
    assert layout.positions.tolist() == [0, 0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 4, 5]
    assert layout.first_rows.tolist() == [1, 7, 4, 0]
    assert layout.rows_at(torch.tensor([14, 6, 2])).tolist() == [6, 7, 3]


def test_packing_and_padding_are_each_others_gradient() -> None:
    """In float64, against finite differences, twice differentiated: both functions are written by hand."""
    layout = TokenLayout(torch.arange(4) < torch.tensor([3, 4, 1])[:, None])
    rows = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)
    padded = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layout.pad, rows)
    assert torch.autograd.gradcheck(layout.pack, padded)
    assert torch.autograd.gradgradcheck(lambda x: layout.pack(layout.pad(x) ** 2), rows)
    assert torch.equal(layout.pack(layout.pad(rows)), rows)


@pytest.mark.parametrize("unpad", [True, False])
def test_attention_is_the_textbooks(unpad: bool) -> None:
    """softmax(q k^T / sqrt(d)) v, head by head and sequence by sequence, in float64."""
    lengths, heads, width = [3, 5, 3, 1], 2, 8
    layout = TokenLayout(torch.arange(5) < torch.tensor(lengths)[:, None], unpad=unpad)
    padded = torch.randn(3, 4, 5, width, dtype=torch.float64)
    query, key, value = (layout.pack(part) for part in padded)
    got = layout.pad(attention(query, key, value, heads, layout))
    for row, length in enumerate(lengths):
        q, k, v = (part[row, :length].view(length, heads, -1).transpose(0, 1) for part in padded)
        weights = (q @ k.transpose(1, 2) / (width / heads) ** 0.5).softmax(-1)
        expected = (weights @ v).transpose(0, 1).flatten(1)
        torch.testing.assert_close(got[row, :length], expected, rtol=0, atol=1e-14)


def test_misuse_is_refused(small_config: BertConfig, make_batch: Callable) -> None:
    model = BertForPreTraining(small_config)
    batch = make_batch([9, 4])
    ids, segments, mask = batch["input_ids"], batch["token_type_ids"], batch["attention_mask"]
    with pytest.raises(ValueError, match="sequence 1 begins with padding"):
        model(ids, segments, mask.flip(1), batch["masked_positions"])
    with pytest.raises(ValueError, match="point at padding"):
        model(ids, segments, mask, torch.tensor([0, 17]))
    for outside in (-1, 18):
        with pytest.raises(ValueError, match="outside the 18"):
            model(ids, segments, mask, torch.tensor([0, outside]))
    with pytest.raises(ValueError, match=r"sequences of 65 tokens.*max_position_embeddings 64"):
        model.bert(torch.ones(1, 65, dtype=torch.int64))


def test_defaults_are_no_padding_and_one_segment(small_config: BertConfig, make_batch: Callable) -> None:
    model = BertModel(small_config)
    ids = make_batch([9, 9])["input_ids"]
    zeros, ones = torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool)
    assert torch.equal(model(ids)[0], model(ids, zeros, ones)[0])


def varlen_one_by_one(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, *others: object) -> Tensor:
    """What flash attention over packed rows computes, which runs on CUDA alone: [T, n, d] -> [T, n, d]."""
    assert ends.dtype is torch.int32
    assert others[0] is ends
    assert others[1] == others[2] >= int(ends.diff().max())
    sequences = [rows.tensor_split(ends[1:-1].long()) for rows in (query, key, value)]
    heads = [[one.transpose(0, 1)[None] for one in each] for each in zip(*sequences, strict=True)]
    prob = others[3]
    return torch.cat(
        [functional.scaled_dot_product_attention(*each, dropout_p=prob)[0].transpose(0, 1) for each in heads]
    )


@pytest.mark.parametrize("varlen", [varlen_one_by_one, None], ids=["varlen", "nested"])
@pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors"
)  # off CUDA their attention is made of older ones
def test_attention_over_packed_rows_in_one_call_equals_that_of_each_block(varlen: Callable | None) -> None:
    """What CUDA runs, but for the kernels within: offsets, shapes and their order, and the gradients' way back."""
    lengths = torch.tensor([7, 1, 64, 7, 30])
    found = TokenLayout(torch.arange(64) < lengths[:, None])
    rows = torch.randn(3, int(lengths.sum()), 48)
    ours, theirs = (rows.clone().requires_grad_() for _ in range(2))
    packed = _packed_attention(*ours, 4, found, 0.0, varlen)
    blocks = _block_attention(*theirs, 4, found.blocks, 0.0)
    torch.testing.assert_close(packed, blocks, rtol=TOLERANCE, atol=TOLERANCE)
    packed.square().sum().backward()
    blocks.square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=TOLERANCE, atol=TOLERANCE)
    assert not torch.allclose(packed, _packed_attention(*ours, 4, found, 0.5, varlen), atol=1e-2), "no dropout"


@pytest.mark.gpu
def test_dropout_in_flash_attention_keeps_the_mean(small_config: BertConfig) -> None:
    """Of 4,000 draws at probability 0.1 the mean is within 5 standard errors and a rounding of bfloat16."""
    lengths = torch.tensor([7, 1, 64, 7, 30])
    found = TokenLayout((torch.arange(64) < lengths[:, None]).cuda())
    rows = [torch.randn(int(lengths.sum()), 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    whole = attention(*rows, 4, found)
    drawn = torch.stack([attention(*rows, 4, found, Dropout(0.1)).float() for _ in range(4000)])
    error = 5 * drawn.std(0) / 4000**0.5 + 2**-7 * whole.abs().max()
    assert ((drawn.mean(0) - whole).abs() <= error).all()
    assert drawn.std(0).max() > 0.05


@pytest.mark.gpu
def test_dropout_in_flash_attention_goes_the_same_way_back() -> None:
    """The output is linear in the values, so that <output, g> = <values, their gradient>, to a rounding of bfloat16."""
    lengths = torch.tensor([7, 1, 64, 7, 30])
    found = TokenLayout((torch.arange(64) < lengths[:, None]).cuda())
    query, key, value, g = torch.randn(4, int(lengths.sum()), 64, device="cuda", dtype=torch.bfloat16)
    value = value.abs().requires_grad_()  # so that the sums do not cancel
    grads = []
    for _ in range(2):
        out = attention(query.requires_grad_(), key, value, 4, found, Dropout(0.3))
        (grad, _) = torch.autograd.grad(out, (value, query), g.abs())
        there, back = (out.double() * g.abs().double()).sum(), (value.double() * grad.double()).sum()
        assert abs(float(there / back) - 1) < 1e-2
        grads.append(grad)
    assert not torch.equal(*grads), "the same mask twice"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_cuda_equals_the_cpu(dtype: torch.dtype, small_config: BertConfig, make_batch: Callable) -> None:
    """The varlen kernel in half precision, padded attention in fp32. Half precision is off by 2^-8 (bf16) a product."""
    config = BertConfig.from_hf(small_config.to_hf() | {"hidden_size": 64, "num_attention_heads": 2})
    model = BertForPreTraining(config)
    batch = make_batch([7, 30, 7, 2], 33)
    names = ("input_ids", "token_type_ids", "attention_mask", "masked_positions")
    expected = model(*(batch[name] for name in names))
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        got = model.cuda()(*(batch[name].cuda() for name in names))
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 1.5e-1, torch.float32: 1e-4}[dtype]
    for one, other in zip(got, expected, strict=True):
        assert (one.float().cpu() - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.parametrize("checkpoint_layers", [False, True])
@pytest.mark.parametrize("unpad", [False, True])
def test_the_last_layer_need_not_finish_the_rows_that_no_head_reads(
    unpad: bool,
    checkpoint_layers: bool,
    small_config: BertConfig,
    make_batch: Callable,
    assert_same_gradients: Callable,
) -> None:
    """With dropout on, and a position asked for twice: the same as heads on top of the whole encoder."""
    torch.manual_seed(1)
    config = dataclasses.replace(small_config, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    model, whole = (
        BertForPreTraining(config, unpad=unpad, checkpoint_layers=checkpoint_layers).train() for _ in range(2)
    )
    whole.load_state_dict(model.state_dict())
    batch = make_batch([7, 3, 7, 50, 3, 7], 64)
    inputs = [batch[name] for name in ("input_ids", "token_type_ids", "attention_mask")]
    keys = torch.arange(6) * 12345
    positions = torch.cat([batch["masked_positions"], batch["masked_positions"][:1]])
    mlm, nsp = model(*inputs, positions, keys)
    states, pooled = whole.bert(*inputs, keys)
    expected = whole.cls.predictions(states.flatten(0, 1)[positions]), whole.cls.seq_relationship(pooled)
    torch.testing.assert_close((mlm, nsp), expected, rtol=TOLERANCE, atol=TOLERANCE)
    (mlm.square().mean() + nsp.square().mean()).backward()
    sum(logits.square().mean() for logits in expected).backward()
    assert_same_gradients(model, whole, TOLERANCE)
    assert model(*inputs, positions, keys + 1)[0].sub(mlm).abs().max() > 1e-2, "dropout is off"


LONG_MIXES = [
    [1, 512, 1],
    [512, 512],
    [1, 2, 511, 512, 300],
    *(torch.randint(1, 513, (6,), generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(3)),
]


@pytest.mark.parametrize("lengths", LONG_MIXES)
def test_mixes_of_1_to_512_tokens(
    lengths: list[int], small_config: BertConfig, make_batch: Callable, assert_same_gradients: Callable
) -> None:
    """The losses of both heads and all gradients, next sentences included, within 1e-5 in fp32."""
    config = dataclasses.replace(small_config, max_position_embeddings=512, num_hidden_layers=2)
    unpadded, padded = pair(BertForPreTraining, config)
    batch = make_batch(lengths, 512)
    names = ("input_ids", "token_type_ids", "attention_mask", "masked_positions")
    outputs = [model(*(batch[name] for name in names)) for model in (unpadded, padded)]
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE * float(other.detach().abs().max()))
    for model in (unpadded, padded):
        loss_of(model, batch).backward()
    assert_same_gradients(unpadded, padded, TOLERANCE)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_neighbours_of_1_to_512_tokens_never_see_each_other(
    dropout: float, small_config: BertConfig, make_batch: Callable
) -> None:
    """Change every token of one sequence: the outputs and embedding gradients of the others do not move a bit."""
    config = dataclasses.replace(
        small_config,
        max_position_embeddings=512,
        num_hidden_layers=2,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    model = BertModel(config).train()
    lengths = [1, 512, 17, 512, 1]
    batch, others = make_batch(lengths), torch.tensor([0, 2, 3, 4])

    def run(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden, pooled = model(ids, batch["token_type_ids"], batch["attention_mask"], torch.arange(5) * 12345)
        (grad,) = torch.autograd.grad(pooled[others].square().sum(), model.embeddings.position_embeddings.weight)
        return hidden, pooled, grad

    hidden, pooled, grad = run(batch["input_ids"])
    changed = batch["input_ids"].clone()
    changed[1] = (changed[1] + 7) % 211
    hidden_after, pooled_after, grad_after = run(changed)
    assert torch.equal(hidden[others], hidden_after[others])
    assert torch.equal(pooled[others], pooled_after[others])
    assert torch.equal(grad, grad_after)
    assert not torch.equal(hidden[1], hidden_after[1])
