"""A linear layer and the cross-entropy of its outputs in one, so that the logits of a whole micro-batch never exist.

Shapes: N rows of width H; V classes.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import native
from .autocast import product_dtype

# Logits that exist at a time, in the dtype of the product.
CPU_LOGITS = 1 << 24
LOGITS = 1 << 27

# Of them in float32 at a time; on a CPU little enough to stay in its caches. See the log of 2026-11-22.
CPU_BLOCK = 1 << 20
BLOCK = 1 << 24


def loss(products: Tensor, bias: Tensor, labels: Tensor, wants_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of the logits products + bias, by torch's operations, a block of rows in float32 at a time.

    Args:
        products: [N, V]; where gradients are wanted these come in their place.
        bias: [V] float32.
        labels: [N] int64.
        wants_grad: whether they are.

    Returns:
        The summed loss, how many of the largest logits are right, and the gradient of the bias [V] if it is wanted.
    """
    total, right = bias.new_zeros(()), torch.zeros((), dtype=torch.int64, device=bias.device)
    of_bias = torch.zeros_like(bias)
    block = max(1, (CPU_BLOCK if bias.device.type == "cpu" else BLOCK) // len(bias))
    for some, answers in zip(products.split(block), labels[:, None].split(block), strict=True):
        logits = some + bias
        largest, of_answers = logits.amax(-1, keepdim=True), logits.gather(-1, answers)
        right += _wins(logits, largest, of_answers, answers)
        probs = logits.softmax(-1)
        # The largest probability is 1/V or more, whose logarithm is exact; that of the answer may be 0.
        total += (largest - probs.amax(-1, keepdim=True).log() - of_answers).sum()
        if wants_grad:
            probs.scatter_add_(-1, answers, probs.new_full((), -1.0).expand(answers.shape))
            of_bias += probs.sum(0)
            some.copy_(probs)
        del logits, probs  # before the next ones are made
    return total, right, of_bias


def _wins(logits: Tensor, largest: Tensor, of_answers: Tensor, answers: Tensor) -> Tensor:
    """Count the rows in which the answer [N, 1] has the largest logit; of several largest the first wins."""
    if logits.device.type != "cpu":
        return (logits.argmax(-1, keepdim=True) == answers).sum()
    hits = (of_answers == largest).squeeze(1)  # a CPU's argmax takes many times amax's time
    return (logits[hits].argmax(-1) == answers[hits, 0]).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """Chunk by chunk of rows: logits, loss, and since the sum's gradient is known then, all gradients at once."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, chunk: int, is_training: bool
    ) -> tuple[Tensor, Tensor]:
        device = rows.device.type
        dtype = product_dtype(rows)
        ctx.inputs = rows.dtype, weight.dtype, bias.dtype
        wants_grad = is_training and any(ctx.needs_input_grad[:3])
        kernel = native.kernel() if device == "cpu" else None
        loss_of = kernel.loss if kernel is not None and kernel.takes_products(rows) else loss
        total, right = rows.new_zeros((), dtype=torch.float32), torch.zeros((), dtype=torch.int64, device=rows.device)
        grad_weight: Tensor | None = None
        if wants_grad:
            grad_rows = torch.empty(rows.shape, dtype=dtype, device=rows.device)
            grad_bias = torch.zeros(bias.shape, dtype=torch.float32, device=rows.device)
        with torch.autocast(device, enabled=False):
            narrow, bias = weight.to(dtype), bias.float()
            for start in range(0, len(rows), chunk):
                part = rows[start : start + chunk].to(dtype)
                products = part @ narrow.t()
                of_part, right_of_part, of_bias = loss_of(products, bias, labels[start : start + chunk], wants_grad)
                total += of_part
                right += right_of_part
                if not wants_grad:
                    continue
                grad_bias += of_bias
                torch.mm(products, narrow, out=grad_rows[start : start + chunk])
                if grad_weight is None:  # of one chunk it is kept as narrow as the product
                    grad_weight = products.t() @ part
                elif dtype is torch.float32:
                    grad_weight.addmm_(products.t(), part)
                else:
                    grad_weight = grad_weight.float().add_(products.t() @ part)
        if wants_grad:
            if grad_weight is None:
                grad_weight = torch.zeros_like(weight)
            ctx.save_for_backward(grad_rows, grad_weight, grad_bias)
        ctx.mark_non_differentiable(right)
        return total, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        inputs = zip(ctx.saved_tensors, ctx.inputs, ctx.needs_input_grad, strict=False)
        return *(_scaled(saved, grad, dtype) if needed else None for saved, dtype, needed in inputs), None, None, None


def _scaled(tensor: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return tensor * factor in ``dtype``; the product is rounded once."""
    if tensor.dtype.itemsize < 4:
        return tensor.to(torch.float32).mul_(factor).to(dtype)
    return (tensor * factor).to(dtype)


def linear_cross_entropy(rows: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of ``rows @ weight.T + bias``, and how many of its largest logits are right.

    Equal to ``F.cross_entropy(F.linear(rows, weight, bias).float(), labels, reduction="sum")`` up to the order of sums.
    The gradients are reckoned in the forward pass, without computing any logit twice: that takes room for one more
    gradient of ``weight``, and saves four tensors of [N, V].

    Args:
        rows: [N, H]; N may be 0.
        weight: [V, H].
        bias: [V].
        labels: [N] int64, in [0, V).

    Returns:
        The loss, 0-D float32, which can be differentiated once, and the count, 0-D int64.

    Raises:
        ValueError: there is not one label for each row, or they are no whole numbers.
    """
    if labels.shape != rows.shape[:1]:
        raise ValueError(f"labels: shape {list(labels.shape)}, but there are {len(rows)} rows")
    if labels.is_floating_point():
        raise ValueError(f"labels: {labels.dtype}, but they must be whole numbers")
    labels = labels.to(torch.int64)
    on_cpu = rows.device.type == "cpu"
    num_chunks = max(1, math.ceil(len(rows) * len(weight) / (CPU_LOGITS if on_cpu else LOGITS)))
    chunk = max(1, math.ceil(len(rows) / num_chunks))
    is_training = torch.is_grad_enabled()  # which it never is within, and inputs say that they need one all the same
    result: tuple[Tensor, Tensor] = _LinearCrossEntropy.apply(rows, weight, bias, labels, chunk, is_training)
    return result
