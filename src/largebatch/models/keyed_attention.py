"""Attention with dropout by keys, sequence by sequence: little enough at a time to stay in a CPU's cache.

Shapes: T rows, the real tokens; H the model's width; n heads of width d; c sequences of L tokens in a chunk.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dropout import keep_probs_bits, keep_where

# Probabilities that exist at a time, 1 MB of them in bfloat16. See the logs of 2026-11-21 and 22.
CHUNK = 1 << 19


class _KeyedAttention(torch.autograd.Function):
    """Keeps the probabilities for the backward pass, and draws the masks anew there."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, cut: "Cut", site: int, prob: float
    ) -> Tensor:
        ctx.cut, ctx.site, ctx.keep_prob = cut, site, 1 - prob
        query = query * cut.head_width**-0.5
        context = torch.empty_like(value)
        saved = []
        scale = 1.0
        for rows, chunk in cut.chunks():
            q, k, v = (cut.heads(part[rows], chunk) for part in (query, key, value))
            probs = (q @ k.transpose(1, 2)).softmax(-1)
            bits, scale = keep_probs_bits(keys[rows].view(chunk), site, cut.num_heads, ctx.keep_prob)
            bits = bits.view_as(probs)
            cut.put(context[rows], keep_where(probs, bits) @ v, chunk)
            saved.append(probs)
        ctx.save_for_backward(query, key, value, keys, *saved)
        return context.mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cut: Cut = ctx.cut
        query, key, value, keys, *saved = ctx.saved_tensors
        grads = [torch.empty_like(part) for part in (query, key, value)]
        scale = 1.0
        for (rows, chunk), probs in zip(cut.chunks(), saved, strict=True):
            q, k, v, g = (cut.heads(part[rows], chunk) for part in (query, key, value, grad))
            bits, scale = keep_probs_bits(keys[rows].view(chunk), ctx.site, cut.num_heads, ctx.keep_prob)
            bits = bits.view_as(probs)
            of_probs = keep_where(g @ v.transpose(1, 2), bits)
            of_scores = torch._softmax_backward_data(of_probs, probs, -1, probs.dtype)
            of_heads = (of_scores @ k, of_scores.transpose(1, 2) @ q, keep_where(probs, bits).transpose(1, 2) @ g)
            for whole, part in zip(grads, of_heads, strict=True):
                cut.put(whole[rows], part, chunk)
        grads[0].mul_(scale * cut.head_width**-0.5)
        for rest in grads[1:]:
            rest.mul_(scale)
        return *grads, None, None, None, None


class Cut:
    """Packed rows in chunks of sequences of one length.

    Args:
        blocks: (number of sequences, their length) of each run of rows with one length.
        num_heads: n.
        head_width: d.
    """

    def __init__(self, blocks: list[tuple[int, int]], num_heads: int, head_width: int) -> None:
        self.blocks, self.num_heads, self.head_width = blocks, num_heads, head_width

    def chunks(self) -> Iterator[tuple[slice, tuple[int, int]]]:
        """Yield the rows of each chunk, and (c, L)."""
        start = 0
        for count, length in self.blocks:
            size = max(1, CHUNK // (self.num_heads * length**2))
            for first in range(0, count, size):
                some = min(size, count - first)
                yield slice(start, start + some * length), (some, length)
                start += some * length

    def heads(self, rows: Tensor, chunk: tuple[int, int]) -> Tensor:
        """[c L, H] -> [c n, L, d]; of one sequence it is a view."""
        shape = (*chunk, self.num_heads, self.head_width)
        return rows.view(shape).transpose(1, 2).reshape(-1, chunk[1], self.head_width)

    def put(self, rows: Tensor, heads: Tensor, chunk: tuple[int, int]) -> None:
        """Write [c n, L, d] to the rows [c L, H]."""
        shape = (*chunk, self.num_heads, self.head_width)
        rows.view(shape).transpose(1, 2).copy_(heads.view(chunk[0], self.num_heads, chunk[1], self.head_width))


def keyed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    blocks: list[tuple[int, int]],
    row_keys: Tensor,
    site: int,
    prob: float,
) -> Tensor:
    """Attention of each sequence over itself, its probabilities dropped by keys: [T, H] -> [T, H].

    Args:
        query, key, value: [T, H].
        num_heads: n.
        blocks: (number of sequences, their length) of each run of rows with one length.
        row_keys: [T] int32.
        site, prob: the dropout's number in the model, and the probability to drop.
    """
    cut = Cut(blocks, num_heads, query.shape[1] // num_heads)
    context: Tensor = _KeyedAttention.apply(query, key, value, row_keys, cut, site, prob)
    return context
