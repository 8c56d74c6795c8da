"""The C kernel of BERT against torch's operations: the same masks to the bit, the same numbers to their rounding.

Guards against a kernel that drops other elements than its reference, that errs at the end of a row or in the lanes that
a row does not fill, and whose results depend on the threads, the instruction set or the process's defaults. And against
layers that do more than their class says, whose weights were taken without calling them.
"""

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from largebatch import compiled
from largebatch.models import BertConfig, BertForPreTraining, cross_entropy, native, pretraining_loss
from largebatch.models import keyed_attention as attention
from largebatch.models.dense import dense_activation, dense_dropout_add_norm
from largebatch.models.dropout import Dropout
from largebatch.models.keyed_attention import OPERATIONS

if native.kernel() is None:
    pytest.skip("the CPU kernel was not compiled when largebatch was installed", allow_module_level=True)
KERNEL = native.kernel()

SITE, KEEP = 7, 0.9
TOTALS = {"masked": torch.tensor(10), "sequences": torch.tensor(4)}
# Sequences, heads, tokens: full and ragged groups of 16, a last head without a partner, one token.
MATRICES = [(2, 12, 128), (3, 3, 37), (1, 1, 1), (2, 5, 16), (1, 2, 513), (4, 4, 15)]
ROWS = [(200, 768), (3, 37), (65, 129), (64, 16), (130, 63)]
# Of one rounding to the dtype: float32 sums and divides in another order, bfloat16 may round to the other neighbour.
CLOSE = {torch.float32: 1e-6, torch.bfloat16: 2**-7}


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    compiled.choose(KERNEL.library, os.environ.get(compiled.ISA_VARIABLE))


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> str:
    if compiled.choose(KERNEL.library, request.param) != request.param:
        pytest.skip(f"this processor has no {request.param}")
    return str(request.param)


def keys_of(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)


def softmax_both_ways(work: object, shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """Return the signed probabilities, the dropped ones, the gradient of the scores, and the dropped ones again."""
    torch.manual_seed(1)
    count, heads, length = shape
    scores = (torch.randn(count, heads, length, length) * 3).to(dtype)
    grads = torch.randn(scores.shape).to(dtype)
    dropped = work.softmax(scores, keys_of(count, length), SITE, KEEP)
    probs = scores.view(-1, length, length)
    again = work.softmax_backward(grads.view_as(probs), probs)
    return [scores, dropped, grads, again.view_as(dropped)]


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shape", MATRICES)
def test_softmax(isa: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    ours, reference = (softmax_both_ways(work, shape, dtype) for work in (KERNEL, OPERATIONS))
    assert torch.equal(ours[0].signbit(), reference[0].signbit())
    for one, other in zip(ours, reference, strict=True):
        bound = CLOSE[dtype] * other.float().abs()
        if one is ours[2]:  # a difference of gradients, each off by the probabilities' error
            bound = CLOSE[dtype] * (other.float().abs() + 8 * reference[0].float().abs())
        assert ((one.float() - other.float()).abs() <= bound).all()
    assert torch.equal(ours[1], ours[3])
    sums = ours[0].float().abs().sum(-1)
    assert (sums - 1).abs().max() < CLOSE[dtype]


def test_the_signs_are_the_masks() -> None:
    probs, dropped, *_ = softmax_both_ways(KERNEL, (8, 4, 128), torch.float32)
    assert torch.equal(dropped, probs.clamp(min=0))
    assert probs.signbit().double().mean().item() == pytest.approx(0.1, abs=5 * (0.09 / probs.numel()) ** 0.5)


@pytest.mark.parametrize("dtype", CLOSE)
def test_what_is_not_finite_stays_in_its_row(isa: str, dtype: torch.dtype) -> None:
    bad = {0: torch.nan, 1: torch.inf, 2: -torch.inf, 3: 1e30, 4: -1e30}
    for length in (20, 32):
        scores = torch.zeros(1, 1, length, length, dtype=dtype)
        for row, value in bad.items():
            scores[..., row, length - 3] = value
        expected = scores.softmax(-1)
        KERNEL.softmax(scores, keys_of(1, length), SITE, KEEP)
        torch.testing.assert_close(scores.abs(), expected, rtol=CLOSE[dtype], atol=0, equal_nan=True)


def test_the_exponential() -> None:
    """Against float64, over all that a difference from the largest score can be."""
    scores = torch.linspace(-100, 0, 4096).repeat(1, 1, 1, 1)
    rows = torch.cat([scores, torch.full((1, 1, 4095, 4096), -1.0)], 2)
    expected = rows[0, 0, 0].double().softmax(-1)
    KERNEL.softmax(rows, keys_of(1, 4096), SITE, KEEP)
    error = (rows[0, 0, 0].abs().double() - expected).abs()
    assert (error <= 4 * 2**-23 * expected + 1e-38).all()


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("scale", [1.0, 0.125, 1.1])
def test_heads(isa: str, dtype: torch.dtype, scale: float) -> None:
    for count, heads, length, width in ((2, 12, 128, 64), (3, 3, 37, 16), (1, 1, 1, 8), (2, 5, 16, 10)):
        rows = torch.randn(count * length, 2 * heads * width).to(dtype)[:, : heads * width]  # that lie apart
        chunk = (count, length)
        for bias in (torch.randn(heads * width), None):
            ours, reference = (work.split(rows, bias, chunk, heads, scale) for work in (KERNEL, OPERATIONS))
            assert torch.equal(ours, reference)
        joined, summed, expected = torch.zeros(3, count * length, 2 * heads * width).to(dtype).unbind()
        KERNEL.join(ours, joined[:, : heads * width], chunk, heads, scale)
        sums = KERNEL.join_and_sum(ours, summed[:, : heads * width], chunk, heads, scale)
        OPERATIONS.join(ours, expected[:, : heads * width], chunk, heads, scale)
        assert torch.equal(joined, expected)
        assert torch.equal(summed, expected)
        exact = ours.double().view(count, heads, length, width).sum((0, 2)).flatten() * scale
        assert ((sums - exact).abs() <= 1e-6 * ours.double().abs().sum() * scale).all()


def identity(width: int) -> nn.Linear:
    """A layer whose products are its rows, so that a test can choose them; its bias is random."""
    dense = nn.Linear(width, width)
    nn.init.eye_(dense.weight).requires_grad_(False)
    nn.init.normal_(dense.bias)
    return dense


def autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16)


def add_norm(shape: tuple[int, int], dtype: torch.dtype, prob: float, exact: bool) -> list[Tensor]:
    """Return the output and all gradients, by torch in float64 where they are to be exact."""
    torch.manual_seed(1)
    rows, residual, grad = torch.randn(shape).to(dtype), torch.randn(shape), torch.randn(shape)
    norm, dropout, dense = nn.LayerNorm(shape[1], eps=1e-12), Dropout(prob).train(), identity(shape[1])
    dropout.site = SITE
    for part in norm.parameters():
        nn.init.normal_(part)
    keys = keys_of(shape[0])
    if exact:
        rows, residual, grad = rows.double(), residual.double(), grad.double()
        norm.double(), dense.double()
    leaves = [rows.requires_grad_(), dense.bias, residual.requires_grad_(), *norm.parameters()]
    with autocast(torch.float64 if exact else dtype):
        normed = dense_dropout_add_norm(rows, dense, residual, dropout, norm, keys)
    assert ("AddNorm" in normed.grad_fn.name()) is not exact
    return [normed.detach(), *torch.autograd.grad(normed, leaves, grad)]


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize("prob", [0.0, 0.1, 0.5])
def test_add_norm(isa: str, dtype: torch.dtype, shape: tuple[int, int], prob: float) -> None:
    ours, exact = (add_norm(shape, dtype, prob, each) for each in (False, True))
    assert [each.dtype for each in ours] == [torch.float32, dtype, *[torch.float32] * 4]
    for one, other in zip(ours, exact, strict=True):
        close = 2**-8 if one.dtype is torch.bfloat16 else 0
        assert ((one.double() - other).abs() <= close * other.abs() + 1e-6 * other.abs().max()).all()
    dropped = ours[1] == 0
    assert torch.equal(dropped, exact[1] == 0)
    assert dropped.any() == (prob > 0)


def gelu(rows: Tensor, bias: Tensor, grad: Tensor, exact: bool) -> list[Tensor]:
    """Return GELU(rows + bias) and the gradients of both, by torch in float64 where they are to be exact."""
    dense = identity(rows.shape[1])
    with torch.no_grad():
        dense.bias.copy_(bias)
    if exact:
        rows, grad, dense = rows.double(), grad.double(), dense.double()
    rows = rows.clone().requires_grad_()
    with autocast(torch.float64 if exact else torch.bfloat16):
        activated = dense_activation(rows, dense, F.gelu)
    assert (activated.grad_fn.name() == "_GeluBackward") is not exact
    return [activated.detach(), *torch.autograd.grad(activated, [rows, dense.bias], grad)]


@pytest.mark.parametrize("shape", [*ROWS, (0, 20)])
def test_gelu(isa: str, shape: tuple[int, int]) -> None:
    """One rounding to bfloat16, and the cubics' 1e-6 (3e-6 for the slope, which is multiplied by the gradient)."""
    torch.manual_seed(1)
    rows, bias, grad = (torch.randn(shape) * 3).bfloat16(), torch.randn(shape[1]), torch.randn(shape).bfloat16()
    ours, exact = (gelu(rows, bias, grad, each) for each in (False, True))
    assert [each.dtype for each in ours] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for one, other, error in zip(ours[:2], exact[:2], (1e-6, 3e-6 * grad.double().abs()), strict=True):
        assert ((one.double() - other).abs() <= 2**-8 * other.abs() + error).all()
    assert ((ours[2].double() - exact[2]).abs() <= 1e-5 * grad.double().abs().sum(0)).all()


def test_gelu_of_every_bfloat16(isa: str) -> None:
    """All 65,536 of them: NaN at infinities and NaN, as torch has it; x itself and 0 far out."""
    rows = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(256, 256)
    zeros, ones = torch.zeros(256), torch.ones(256, 256, dtype=torch.bfloat16)
    activated, (slope, _) = KERNEL.gelu(rows, zeros), KERNEL.gelu_backward(ones, rows, zeros)
    exact = rows.double().requires_grad_()
    F.gelu(exact).sum().backward()
    finite = rows.isfinite()
    for ours, other, error in ((activated, F.gelu(exact), 1e-6), (slope, exact.grad, 3e-6)):
        assert ((ours.double() - other)[finite].abs() <= 2**-8 * other[finite].abs() + error).all()
        assert ours[rows.isnan()].isnan().all()
    assert activated[rows.isinf()].isnan().all()
    far = rows.abs() > 6
    assert activated[far & finite].equal(rows[far & finite].clamp(min=0))
    assert slope[far & finite].equal((rows[far & finite] > 0).bfloat16())


def losses_both_ways(loss: Callable, rows: int, classes: int, dtype: torch.dtype) -> list[Tensor]:
    """Return loss, count, the bias's gradient and the products'; every other label is right."""
    torch.manual_seed(1)
    products, bias = (torch.randn(rows, classes) * 2).to(dtype), torch.randn(classes)
    labels = torch.randint(0, classes, (rows,))
    labels[::2] = (products + bias).argmax(-1)[::2]
    without = loss(products.clone(), bias, labels, False)
    results = [*loss(products, bias, labels, True), products]
    assert all(torch.equal(one, other) for one, other in zip(results[:2], without[:2], strict=True))
    return results


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(("rows", "classes"), [(70, 1000), (5, 37), (1, 1), (16, 16), (33, 4097)])
def test_loss(isa: str, dtype: torch.dtype, rows: int, classes: int) -> None:
    ours, reference = (losses_both_ways(loss, rows, classes, dtype) for loss in (KERNEL.loss, cross_entropy.loss))
    torch.testing.assert_close(ours[0], reference[0], rtol=1e-6, atol=1e-6)
    assert int(ours[1]) == int(reference[1]) >= (rows + 1) // 2
    torch.testing.assert_close(ours[2], reference[2], rtol=1e-5, atol=1e-6)
    # The label's own is a difference from 1, and off by a rounding of that.
    bound = CLOSE[dtype] * (reference[3].float().abs() + (reference[3] < 0) * 2**-7)
    assert ((ours[3].float() - reference[3].float()).abs() <= bound + 1e-7).all()


def test_a_loss_that_is_not_finite_is_not_hidden(isa: str) -> None:
    for value in (torch.nan, torch.inf):
        products = torch.zeros(3, 20)
        products[1, 18] = value
        loss, _, of_bias = KERNEL.loss(products, torch.zeros(20), torch.tensor([1, 1, 1]), True)
        assert loss.isnan()
        assert of_bias.isnan().any()
        assert products[[0, 2]].isfinite().all()


def everything(dtype: torch.dtype) -> list[Tensor]:
    some_losses = losses_both_ways(KERNEL.loss, 70, 1000, dtype)
    activated = gelu(torch.randn(300, 129), torch.randn(129), torch.randn(300, 129).bfloat16(), exact=False)
    normed = add_norm((300, 129), dtype, 0.1, exact=False)
    heads = torch.randn(4 * 3, 67, 20).to(dtype)
    rows = torch.empty(4 * 67, 60, dtype=dtype)
    sums = KERNEL.join_and_sum(heads, rows, (4, 67), 3, 0.3)
    split = KERNEL.split(rows, sums, (4, 67), 3, 0.3)
    return [*softmax_both_ways(KERNEL, (3, 3, 67), dtype), rows, sums, split, *normed, *activated, *some_losses]


@pytest.mark.parametrize("dtype", CLOSE)
def test_threads_and_instruction_sets_change_no_bit(dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    alone = everything(dtype)
    torch.set_num_threads(3)
    together = everything(dtype)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
    if compiled.choose(KERNEL.library, "avx512") == "avx512":
        compiled.choose(KERNEL.library, "avx2")
        assert all(torch.equal(one, other) for one, other in zip(alone, everything(dtype), strict=True))


@pytest.mark.parametrize("dtype", CLOSE)
def test_attention(isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of it and its gradients, in chunks, against float64."""
    monkeypatch.setattr(attention, "CHUNK", 3 * 2 * 9**2)
    blocks, heads, width = [(1, 4), (5, 9), (1, 17)], 3, 8
    torch.manual_seed(1)
    products, bias = torch.randn(4 + 45 + 17, 3 * heads * width).to(dtype), torch.randn(3 * heads * width)
    keys, seen = keys_of(len(products)), []
    for is_exact in (False, True):
        leaves = [(each.double() if is_exact else each.clone()).requires_grad_() for each in (products, bias)]
        context = attention.keyed_attention(*leaves, heads, blocks, keys, SITE, 0.3)
        assert (context.grad_fn.work is KERNEL) is not is_exact
        seen.append([context, *torch.autograd.grad(context.double().square().sum(), leaves)])
    for one, other in zip(*seen, strict=True):
        for part, of_other in zip(one.chunk(3, -1), other.chunk(3, -1), strict=True):
            assert (part.double() - of_other).norm() < (0.02 if dtype is torch.bfloat16 else 1e-6) * other.norm()


def test_what_it_does_not_take_is_left_to_torch() -> None:
    rows, norm, dense, dropout = torch.ones(2, 4), nn.LayerNorm(4), nn.Linear(4, 4), Dropout(0.1).train()
    assert KERNEL.takes_attention(rows, 4096)
    assert KERNEL.takes_products(rows, rows, norm.weight, norm.bias)
    assert not KERNEL.takes_attention(rows, 4097)
    for other in (rows.half(), rows.double(), rows.to("meta")):
        assert not KERNEL.takes_attention(other, 4)
        assert not KERNEL.takes_products(other, rows, norm.weight, norm.bias)
    assert not KERNEL.takes_products(rows, rows.bfloat16(), norm.weight, norm.bias)
    assert not KERNEL.takes_products(rows, rows, norm.weight, None)
    # In float32, of another function, without a bias, and in a layer of another kind, which may do more.
    other_kind = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    assert dense_activation(rows, dense, F.gelu).grad_fn.name() == "GeluBackward0"
    with autocast(torch.bfloat16):
        assert dense_activation(rows, dense, F.gelu).grad_fn.name() == "_GeluBackward"
        for layer, function in ((dense, F.relu), (nn.Linear(4, 4, bias=False), F.gelu), (other_kind, F.gelu)):
            assert dense_activation(rows, layer, function).grad_fn.name() in ("GeluBackward0", "ReluBackward0")
    for layer, after, is_ours in ((dense, norm, True), (other_kind, norm, False), (dense, Doubled(4), False)):
        normed = dense_dropout_add_norm(rows, layer, rows, dropout, after, keys_of(2))
        assert (normed.grad_fn.name() == "_AddNormBackward") is is_ours


class Doubled(nn.LayerNorm):
    def forward(self, rows: Tensor) -> Tensor:
        return 2 * super().forward(rows)


def double(layer: nn.Module) -> None:
    """As packages that move weights about do: the instance has another ``forward`` than its class."""
    forward = layer.forward
    layer.forward = lambda rows: 2 * forward(rows)


@pytest.fixture
def keyed_batch(make_batch: Callable) -> dict[str, Tensor]:
    return {**make_batch([9, 30, 9, 4], 40), "dropout_keys": torch.arange(4) * 12345}


def keyed_model(config: BertConfig) -> BertForPreTraining:
    torch.manual_seed(1)
    return BertForPreTraining(dataclasses.replace(config, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1))


def gradients_of(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    pretraining_loss(model, batch, TOTALS)[0].backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, "meta"])
def test_what_the_process_makes_by_default_is_nothing_to_it(
    default: torch.dtype | str, small_config: BertConfig, keyed_batch: dict[str, Tensor]
) -> None:
    """C took tensors of the default dtype for float32, and wrote past their end, or to where meta tensors are not."""
    model = keyed_model(small_config)
    expected = gradients_of(model, keyed_batch)
    try:
        torch.set_default_device(default) if default == "meta" else torch.set_default_dtype(default)
        ours = gradients_of(model, keyed_batch)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in ours.items())


def test_a_hook_sees_every_layer(small_config: BertConfig, keyed_batch: dict[str, Tensor]) -> None:
    model, seen = keyed_model(small_config), set()
    layers = {name for name, part in model.named_modules() if isinstance(part, nn.Linear | nn.LayerNorm | nn.Embedding)}
    for name in layers:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.add(name))
    gradients_of(model, keyed_batch)
    assert seen == layers


@pytest.mark.parametrize(
    "layer",
    [
        "bert.encoder.layer.1.attention.self.key",
        "bert.encoder.layer.0.output.dense",
        "bert.embeddings.word_embeddings",
        "cls.predictions.decoder",
    ],
)
@pytest.mark.parametrize(
    "change",
    [nn.utils.spectral_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.5), double],
    ids=["spectral_norm", "pruning", "a forward of its own"],
)
def test_a_layer_that_does_more_is_called(
    layer: str,
    change: Callable[[nn.Module], object],
    small_config: BertConfig,
    keyed_batch: dict[str, Tensor],
    assert_same_gradients: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against padded rows, all logits and no kernel, which call every layer; in two steps, as its weight changes.

    1e-5: float32 sums in another order.
    """
    ours, plain = keyed_model(small_config), keyed_model(small_config)
    plain.bert.unpad = plain.takes_labels = False
    for model in (ours, plain):
        torch.manual_seed(2)  # `spectral_norm` draws where it starts
        change(model.get_submodule(layer))
        for _ in range(2):
            gradients_of(model, keyed_batch)
            torch.optim.SGD(model.parameters(), 0.1).step()
        monkeypatch.setattr(native, "kernel", lambda: None)
    assert_same_gradients(ours, plain, 1e-5)


def test_a_missing_library_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, make_norm: Callable[[], Tensor]
) -> None:
    def missing(folder: object) -> None:
        raise ImportError("not compiled")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(compiled, "load", missing)
        native.kernel.cache_clear()
        names = [make_norm().grad_fn.name() for _ in range(3)]
    native.kernel.cache_clear()
    assert names == ["NativeLayerNormBackward0"] * 3
    (record,) = caplog.records
    assert record.getMessage() == "BERT on the CPU runs on torch operations, more slowly: not compiled"
    assert make_norm().grad_fn.name() == "_AddNormBackward"


@pytest.fixture
def make_norm() -> Callable[[], Tensor]:
    rows, norm, dropout, dense = torch.ones(2, 4), nn.LayerNorm(4), Dropout(0.1).train(), nn.Linear(4, 4)
    return lambda: dense_dropout_add_norm(rows, dense, rows, dropout, norm, keys_of(2))


def test_c_reads_what_it_is_given_in_any_layout() -> None:
    """Strided parameters and wider keys are put in order first; C would read their memory as it lies."""
    shape = (20, 64)
    products, residual, products_bias, weight, bias = (torch.randn(size) for size in (shape, shape, 64, 64, 64))
    keys = keys_of(20)
    expected = KERNEL.add_norm(products, products_bias, residual, weight, bias, keys, SITE, 0.1, 1e-12)
    strided = [x.repeat_interleave(2)[::2] for x in (products_bias, weight, bias)]
    ours = KERNEL.add_norm(products, strided[0], residual, *strided[1:], keys.long(), SITE, 0.1, 1e-12)
    assert all(map(torch.equal, ours, expected))
    total, moments, _ = expected
    gradients = [
        KERNEL.add_norm_backward(residual, each, some, total, moments, SITE, 0.1, torch.float32)
        for each, some in ((weight, keys), (strided[1], keys.long()))
    ]
    assert all(map(torch.equal, *gradients))


def test_c_is_not_given_what_is_too_short_or_elsewhere() -> None:
    """Guards: it reads as much as it expects, past the end of what is there."""
    rows, bias, keys = torch.randn(20, 64), torch.randn(64), keys_of(20)
    with pytest.raises(ValueError, match=r"keys: shape \[19\], but \[20\] is needed"):
        KERNEL.add_norm(rows, bias, rows, bias, bias, keys[1:], SITE, 0.1, 1e-12)
    with pytest.raises(ValueError, match=r"residual: shape \[1, 64\], but \[20, 64\]"):
        KERNEL.add_norm(rows, bias, rows[:1], bias, bias, keys, SITE, 0.1, 1e-12)
    with pytest.raises(ValueError, match=r"weight: shape \[63\]"):
        KERNEL.add_norm(rows, bias, rows, bias[1:], bias, keys, SITE, 0.1, 1e-12)
    with pytest.raises(ValueError, match=r"bias: shape \[63\]"):
        KERNEL.gelu(rows.bfloat16(), bias[1:])
    with pytest.raises(ValueError, match=r"keys: shape \[1, 8\], but \[2, 8\]"):
        KERNEL.softmax(torch.zeros(2, 1, 8, 8), keys_of(1, 8), SITE, KEEP)
    labels = torch.zeros(20, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"labels: shape \[19\], but \[20\]"):
        KERNEL.loss(rows, bias, labels[1:], False)
    with pytest.raises(ValueError, match="labels: on meta, but the others are on the CPU"):
        KERNEL.loss(rows, bias, labels.to("meta"), False)
