"""A linear layer and the cross-entropy of its outputs in one, so that the logits of a whole micro-batch never exist.

Shapes: N rows of width H; V classes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits that exist at a time. On a CPU 2^24 (64 MB) were as fast as all at once, 2^20 up to 10% slower (BERT-tiny to
# -base, one Zen 3 core, torch 2.13, tuned allocator, 2026-11-21).
CPU_LOGITS = 1 << 24
LOGITS = 1 << 27


class _LinearCrossEntropy(torch.autograd.Function):
    """Chunk by chunk of rows: logits, loss, and since the sum's gradient is known then, all gradients at once."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        device = rows.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
        ctx.inputs = rows.dtype, weight.dtype, bias.dtype
        wants_grad = any(ctx.needs_input_grad[:3])
        loss, right = rows.new_zeros((), dtype=torch.float32), torch.zeros((), dtype=torch.int64, device=rows.device)
        if wants_grad:
            grad_rows = torch.empty(rows.shape, dtype=dtype, device=rows.device)
            grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=rows.device)
            grad_bias = torch.zeros(bias.shape, dtype=torch.float32, device=rows.device)
        with torch.autocast(device, enabled=False):
            narrow = weight.to(dtype)
            for start in range(0, len(rows), chunk):
                part, answers = rows[start : start + chunk].to(dtype), labels[start : start + chunk, None]
                logits = F.linear(part, narrow, bias.to(dtype)).float()
                largest, of_answers = logits.amax(-1, keepdim=True), logits.gather(-1, answers)
                # Ties, of which bfloat16 has many, go to the first; a CPU's argmax takes five times amax's time.
                wins = of_answers == largest if dtype is torch.float32 else logits.argmax(-1, keepdim=True) == answers
                right += wins.sum()
                probs = logits.softmax(-1)
                # The largest probability is 1/V or more, whose logarithm is exact; that of the answer may be 0.
                loss += (largest - probs.amax(-1, keepdim=True).log() - of_answers).sum()
                del logits  # before the next ones are made
                if not wants_grad:
                    continue
                probs.scatter_add_(-1, answers, probs.new_full((), -1.0).expand(answers.shape))
                grad_bias += probs.sum(0)
                probs = probs.to(dtype)
                torch.mm(probs, narrow, out=grad_rows[start : start + chunk])
                if dtype is torch.float32:
                    torch.addmm(grad_weight, probs.t(), part, out=grad_weight)
                else:
                    grad_weight += probs.t() @ part
                del probs
        if wants_grad:
            ctx.save_for_backward(grad_rows, grad_weight, grad_bias)
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        of_inputs = zip(ctx.saved_tensors, ctx.inputs, ctx.needs_input_grad, strict=False)
        return *((saved * grad).to(dtype) if needed else None for saved, dtype, needed in of_inputs), None, None


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
    """
    room = CPU_LOGITS if rows.device.type == "cpu" else LOGITS
    result: tuple[Tensor, Tensor] = _LinearCrossEntropy.apply(rows, weight, bias, labels, max(1, room // len(weight)))
    return result
