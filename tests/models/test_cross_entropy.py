"""The linear layer that is one with its cross-entropy equals the two apart: loss, count and every gradient."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from largebatch.models import BertConfig, BertForPreTraining, cross_entropy, native, pretraining_loss
from largebatch.models.cross_entropy import linear_cross_entropy


@pytest.fixture(autouse=True, params=["kernel", "operations"])
def _both_ways_in_small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "operations":
        monkeypatch.setattr(native, "kernel", lambda: None)
    elif native.kernel() is None:
        pytest.skip("the CPU kernel was not compiled when largebatch was installed")
    monkeypatch.setattr(cross_entropy, "CPU_LOGITS", 7 * 50)  # 7 rows of 50 classes
    monkeypatch.setattr(cross_entropy, "CPU_BLOCK", 3 * 50)


def draw(rows: int) -> tuple[list[Tensor], Tensor]:
    inputs = [torch.randn(rows, 16), torch.randn(50, 16), torch.randn(50)]
    return [a.requires_grad_() for a in inputs], torch.randint(0, 50, (rows,))


def apart(inputs: list[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(*inputs).float()
    return F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(-1) == labels).sum()


@pytest.mark.parametrize("rows", [0, 1, 7, 20])
def test_equals_the_two_apart(rows: int) -> None:
    # Sums of 50 and of 20 float32 terms in another order: 20 · 6e-8 of the largest.
    inputs, labels = draw(rows)
    twins = [a.detach().clone().requires_grad_() for a in inputs]
    loss, right = linear_cross_entropy(*inputs, labels)
    expected, expected_right = apart(twins, labels)
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=1e-6)
    assert int(right) == int(expected_right)
    (loss / 3).backward()
    (expected / 3).backward()
    for a, b in zip(inputs, twins, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [5, 20])  # one chunk, whose gradients wait in bfloat16, and three
def test_under_autocast(rows: int) -> None:
    # bfloat16 rounds logits and probabilities to 2^-9 on either side: they agree as well as either does with float32.
    inputs, labels = draw(rows)
    twins = [a.detach().clone().requires_grad_() for a in inputs]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = linear_cross_entropy(*inputs, labels)
        expected, _ = apart(twins, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    (loss / 3).backward()
    (expected / 3).backward()
    for a, b in zip(inputs, twins, strict=True):
        assert a.grad.dtype is torch.float32
        assert float((a.grad - b.grad).norm()) < 0.02 * float(b.grad.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [5, 20])
def test_a_graph_that_is_kept_gives_the_same_gradients_again(rows: int, dtype: torch.dtype) -> None:
    inputs, labels = draw(rows)
    inputs = [a.detach().to(dtype).requires_grad_() for a in inputs]
    loss, _ = linear_cross_entropy(*inputs, labels)
    first = torch.autograd.grad(loss / 3, inputs, retain_graph=True)
    again = torch.autograd.grad(loss / 3, inputs)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert [x.dtype for x in first] == [dtype] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_several_largest_logits_the_first_wins(dtype: torch.dtype) -> None:
    weight = torch.zeros(50, 16)
    weight[[7, 30]] = 1
    rows, bias, labels = torch.ones(4, 16), torch.zeros(50), torch.tensor([7, 30, 7, 0])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        assert int(linear_cross_entropy(rows, weight, bias, labels)[1]) == 2


def test_without_gradients_none_are_reckoned(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, labels = draw(20)
    asked: list[bool] = []

    def spy(*arguments: object) -> tuple[Tensor, ...]:
        asked.append(arguments[-1])
        return loss_by_torch(*arguments)

    loss_by_torch = cross_entropy.loss
    monkeypatch.setattr(cross_entropy, "loss", spy)
    monkeypatch.setattr(cross_entropy.native, "kernel", lambda: None)
    linear_cross_entropy(*inputs, labels)
    with torch.no_grad():
        loss, right = linear_cross_entropy(*inputs, labels)
    assert asked[0]
    assert not any(asked[len(asked) // 2 :])
    expected, expected_right = apart(inputs, labels)
    torch.testing.assert_close(loss, expected.detach(), rtol=2e-6, atol=1e-6)
    assert int(right) == int(expected_right)


def test_only_what_is_asked_for_has_a_gradient() -> None:
    inputs, labels = draw(20)
    inputs[1].requires_grad_(False)
    linear_cross_entropy(*inputs, labels)[0].backward()
    assert inputs[1].grad is None
    assert inputs[0].grad is not None


@pytest.mark.parametrize("label", [-1, 50])
def test_a_label_that_is_no_class_is_an_error(label: int) -> None:
    inputs, labels = draw(20)
    labels[13] = label
    with pytest.raises((IndexError, RuntimeError), match=r"outside 0\.\.49|out of bounds"):
        linear_cross_entropy(*inputs, labels)


@pytest.mark.parametrize("masked", [True, False])
def test_the_pretraining_loss_is_the_same_with_and_without_logits(
    masked: bool, small_config: BertConfig, make_batch: Callable, assert_same_gradients: Callable
) -> None:
    torch.manual_seed(1)
    model, twin = BertForPreTraining(small_config), BertForPreTraining(small_config)
    twin.load_state_dict(model.state_dict())
    twin.takes_labels = False
    batch = make_batch([7, 3, 7, 50, 3, 7], 64)
    if not masked:
        batch |= {name: batch[name][:0] for name in ("masked_positions", "masked_labels")}
    totals = {"masked": torch.tensor(10), "sequences": torch.tensor(5)}
    results = [pretraining_loss(each, batch, totals) for each in (model, twin)]
    for loss, _ in results:
        loss.backward()
    torch.testing.assert_close(*(loss for loss, _ in results), rtol=1e-5, atol=0)
    torch.testing.assert_close(*(metrics for _, metrics in results), rtol=1e-5, atol=1e-6)
    assert_same_gradients(model, twin, 1e-5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_are_taken_as_they_come(dtype: torch.dtype) -> None:
    """Guards: the kernel, in C, read 20 labels of four bytes as ten of eight, and past their end."""
    inputs, labels = draw(20)
    expected, expected_right = linear_cross_entropy(*inputs, labels)
    for same in (labels.to(dtype), labels.repeat_interleave(2)[::2], labels.to(dtype).repeat_interleave(2)[::2]):
        loss, right = linear_cross_entropy(*inputs, same)
        assert torch.equal(loss, expected)
        assert int(right) == int(expected_right)


@pytest.mark.parametrize("number", [0, 19, 21, 40])
def test_a_label_for_each_row_is_needed(number: int) -> None:
    inputs, labels = draw(20)
    with pytest.raises(ValueError, match=rf"labels: shape \[{number}\], but there are 20 rows"):
        linear_cross_entropy(*inputs, labels.repeat(2)[:number])


def test_labels_are_whole_numbers() -> None:
    inputs, labels = draw(20)
    with pytest.raises(ValueError, match=r"labels: torch\.float32, but they must be whole numbers"):
        linear_cross_entropy(*inputs, labels.float())
