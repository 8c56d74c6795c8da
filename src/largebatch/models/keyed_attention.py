"""Attention with dropout by keys, sequence by sequence: little enough at a time to stay in a CPU's cache.

Between the matrix products, in one pass each, a kernel in C does the work (`native`). The class `Operations` here does
the same by torch's operations: what the kernel is tested against, and what runs where it cannot.

Shapes: T rows, the real tokens; H the model's width; n heads of width d; c sequences of L tokens in a chunk.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import native
from .dropout import keep_probs_bits, keep_where, scale_of

# Probabilities that exist at a time, 4 MB of them in bfloat16. See the log of 2026-11-22.
CHUNK = 1 << 21


class Operations:
    """What lies between the matrix products, by torch's operations."""

    def split(self, rows: Tensor, bias: Tensor | None, chunk: tuple[int, int], num_heads: int, scale: float) -> Tensor:
        """[c L, H] -> [c n, L, d], plus the bias [H] of float32 if there is one, times ``scale``."""
        heads = (rows if bias is None else rows + bias) * scale
        heads = heads.to(rows.dtype).view(*chunk, num_heads, -1).transpose(1, 2)
        return heads.reshape(chunk[0] * num_heads, chunk[1], -1)

    def join(self, heads: Tensor, rows: Tensor, chunk: tuple[int, int], num_heads: int, scale: float) -> None:
        """Write [c n, L, d], times ``scale``, to rows [c L, H]."""
        by_sequence = heads.view(chunk[0], num_heads, *heads.shape[1:]).transpose(1, 2)
        rows.view(*chunk, num_heads, -1).copy_(by_sequence * scale)

    def join_and_sum(self, heads: Tensor, rows: Tensor, chunk: tuple[int, int], num_heads: int, scale: float) -> Tensor:
        """Do the same, and return the sum of the rows, [H], in float32 or better."""
        self.join(heads, rows, chunk, num_heads, scale)
        return rows.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32))

    def softmax(self, scores: Tensor, keys: Tensor, site: int, keep_prob: float) -> Tensor:
        """Turn scores into probabilities in place, and return these with zeros for those that are dropped.

        The sign of a probability says afterwards whether it was dropped.

        Args:
            scores: [c, n, L, L].
            keys: [c, L] int32, of the query rows.
            site, keep_prob: as for `keep_probs_bits`.
        """
        probs = scores.softmax(-1)
        bits, _ = keep_probs_bits(keys, site, scores.shape[1], keep_prob)
        torch.where(bits.bool(), probs, -probs, out=scores)
        return keep_where(probs, bits)

    def softmax_backward(self, grads: Tensor, probs: Tensor) -> Tensor:
        """Turn the gradients of dropped probabilities into those of scores in place; return the dropped ones again.

        Args:
            grads: [c n, L, L].
            probs: as `softmax` left them, of the same shape.
        """
        lives = ~probs.signbit()
        grads.copy_(torch._softmax_backward_data(grads * lives, probs.abs(), -1, probs.dtype))
        return probs * lives


OPERATIONS = Operations()


class _KeyedAttention(torch.autograd.Function):
    """Keeps the heads of its inputs and the probabilities for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, products: Tensor, bias: Tensor | None, keys: Tensor, cut: "Cut", site: int, prob: float
    ) -> Tensor:
        kernel = native.kernel()
        work = kernel if kernel is not None and kernel.takes_attention(products, cut.longest) else OPERATIONS
        ctx.cut, ctx.work, ctx.scale = cut, work, scale_of(1 - prob)
        context = products.new_empty(len(products), cut.num_heads * cut.head_width)
        biases = [None] * 3 if bias is None else bias.chunk(3)
        saved = []
        for rows, chunk in cut.chunks():
            q, k, v = (
                work.split(part, its_bias, chunk, cut.num_heads, scale)
                for part, its_bias, scale in zip(products[rows].chunk(3, 1), biases, cut.scales, strict=True)
            )
            probs = torch.bmm(q, k.transpose(1, 2))
            matrices = probs.view(chunk[0], cut.num_heads, chunk[1], chunk[1])
            dropped = work.softmax(matrices, keys[rows].view(chunk), site, 1 - prob).view_as(probs)
            work.join(torch.bmm(dropped, v), context[rows], chunk, cut.num_heads, ctx.scale)
            saved += [q, k, v, probs]
        ctx.save_for_backward(*saved)
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cut, work = ctx.cut, ctx.work
        grad = grad.contiguous()
        of_products = grad.new_empty(len(grad), 3 * grad.shape[1])
        of_bias = grad.new_zeros(3, grad.shape[1], dtype=torch.promote_types(grad.dtype, torch.float32))
        saved = iter(ctx.saved_tensors)
        for rows, chunk in cut.chunks():
            q, k, v, probs = (next(saved) for _ in range(4))
            g = work.split(grad[rows], None, chunk, cut.num_heads, ctx.scale)
            of_scores = torch.bmm(g, v.transpose(1, 2))
            dropped = work.softmax_backward(of_scores, probs)
            of_heads = (
                torch.bmm(of_scores, k),
                torch.bmm(of_scores.transpose(1, 2), q),
                torch.bmm(dropped.transpose(1, 2), g),
            )
            parts = of_products[rows].chunk(3, 1)
            for heads, part, scale, sums in zip(of_heads, parts, cut.scales, of_bias, strict=True):
                sums += work.join_and_sum(heads, part, chunk, cut.num_heads, scale)
        return of_products, of_bias.flatten() if ctx.needs_input_grad[1] else None, None, None, None, None


class Cut:
    """Packed rows in chunks of sequences of one length.

    Args:
        blocks: (number of sequences, their length) of each run of rows with one length.
        num_heads: n.
        head_width: d.

    Attributes:
        scales: by what a query, a key and a value are multiplied.
    """

    def __init__(self, blocks: list[tuple[int, int]], num_heads: int, head_width: int) -> None:
        self.blocks, self.num_heads, self.head_width = blocks, num_heads, head_width
        self.longest = max(length for _, length in blocks)
        self.scales = (head_width**-0.5, 1.0, 1.0)

    def chunks(self) -> Iterator[tuple[slice, tuple[int, int]]]:
        """Yield the rows of each chunk, and (c, L)."""
        start = 0
        for count, length in self.blocks:
            size = max(1, CHUNK // (self.num_heads * length**2))
            for first in range(0, count, size):
                some = min(size, count - first)
                yield slice(start, start + some * length), (some, length)
                start += some * length


def keyed_attention(
    products: Tensor,
    bias: Tensor | None,
    num_heads: int,
    blocks: list[tuple[int, int]],
    row_keys: Tensor,
    site: int,
    prob: float,
) -> Tensor:
    """Attention of each sequence over itself, its probabilities dropped by keys: [T, 3 H] -> [T, H].

    Args:
        products: [T, 3 H], contiguous: of each row query, key and value.
        bias: [3 H], what is to be added to them; None for nothing.
        num_heads: n.
        blocks: (number of sequences, their length) of each run of rows with one length.
        row_keys: [T] int32.
        site, prob: the dropout's number in the model, and the probability to drop.
    """
    cut = Cut(blocks, num_heads, products.shape[1] // (3 * num_heads))
    context: Tensor = _KeyedAttention.apply(products, bias, row_keys, cut, site, prob)
    return context
