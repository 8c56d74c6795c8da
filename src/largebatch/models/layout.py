"""Padding dropped and put back: the packed rows of real tokens of a micro-batch, and attention over them.

Shapes: B sequences of padded length L; T real tokens; H the model's width; n heads of width d.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _SpreadRows(torch.autograd.Function):
    """Put row i of the input in row ``index[i]`` of a larger tensor of zeros; the indices are distinct."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(index)
        return rows.new_zeros(num_rows, *rows.shape[1:]).index_copy_(0, index, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return _PickRows.apply(grad, index), None, None


class _PickRows(torch.autograd.Function):
    """Row ``index[i]`` of the input becomes row i; the indices are distinct, so the gradient needs no summing."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_rows = rows.shape[0]
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return _SpreadRows.apply(grad, index, ctx.num_rows), None


class TokenLayout:
    """Where each token of a padded [B, L] micro-batch lies among the packed rows the model works on.

    With ``unpad`` the rows are the T real tokens, sequence after sequence; without, they are all B * L positions.
    It is made once a micro-batch and serves every layer.

    Args:
        attention_mask: [B, L], true where a token is real. The first position of every sequence must be real.
        unpad: whether to drop the padding.

    Raises:
        ValueError: if a sequence does not begin with a real token (checked on the CPU only: elsewhere it would
            stall the device).
    """

    def __init__(self, attention_mask: Tensor, *, unpad: bool = True) -> None:
        self.mask = attention_mask.bool()  # [B, L]
        self.batch_size, self.sequence_length = self.mask.shape
        self.token_index: Tensor | None = None
        self.positions = torch.arange(self.sequence_length, device=self.mask.device).repeat(self.batch_size)
        self.first_rows = torch.arange(self.batch_size, device=self.mask.device) * self.sequence_length
        if self.mask.device.type == "cpu" and not bool(self.mask[:, 0].all()):
            row = int((~self.mask[:, 0]).nonzero()[0])
            raise ValueError(f"attention_mask: sequence {row} begins with padding; pad at the end")
        if unpad:
            flat = self.mask.flatten()
            self.token_index = flat.nonzero().squeeze(1)  # [T]
            self.positions = self.positions[self.token_index]
            self.row_of_position = flat.cumsum(0) - 1  # [B * L]
            self.first_rows = self.row_of_position[self.first_rows]
            if self.token_index.numel() == flat.numel():
                self.token_index = None

    def pack(self, padded: Tensor) -> Tensor:
        """Drop the padding: [B, L, ...] -> [T, ...]."""
        flat = padded.reshape(self.batch_size * self.sequence_length, *padded.shape[2:])
        return flat if self.token_index is None else _PickRows.apply(flat, self.token_index)

    def pad(self, rows: Tensor) -> Tensor:
        """Put the padding back, as zeros: [T, ...] -> [B, L, ...]."""
        if self.token_index is not None:
            rows = _SpreadRows.apply(rows, self.token_index, self.batch_size * self.sequence_length)
        return rows.reshape(self.batch_size, self.sequence_length, *rows.shape[1:])

    def rows_at(self, positions: Tensor) -> Tensor:
        """Translate positions that are flat into B * L to packed rows; they must be positions of real tokens."""
        if positions.device.type == "cpu" and not bool(self.mask.flatten()[positions].all()):
            raise ValueError("positions: some point at padding")
        return positions if self.token_index is None else self.row_of_position[positions]

    @functools.cached_property
    def key_mask(self) -> Tensor | None:
        """[B, 1, 1, L] for ``scaled_dot_product_attention``, or None where nothing is padding."""
        if self.mask.device.type == "cpu" and bool(self.mask.all()):
            return None
        return self.mask[:, None, None, :]

    @functools.cached_property
    def cumulative_lengths(self) -> Tensor:
        """[B + 1] int32: the row at which each sequence begins, and T."""
        return F.pad(self.mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)


def attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int, layout: TokenLayout, dropout: float) -> Tensor:
    """Scaled dot-product attention of each sequence over itself, on packed rows [T, H] -> [T, H].

    On CUDA in half precision without dropout it runs on the packed rows (``torch.nn.attention.varlen``); everywhere
    else the rows are padded around ``scaled_dot_product_attention``.
    """
    varlen = _varlen_attention() if query.is_cuda else None
    if varlen is not None and query.dtype in (torch.float16, torch.bfloat16) and not dropout:
        per_head = [rows.view(rows.shape[0], num_heads, -1) for rows in (query, key, value)]
        ends, longest = layout.cumulative_lengths, layout.sequence_length
        if layout.token_index is not None:
            return varlen(*per_head, ends, ends, longest, longest).flatten(1)

    def split_heads(rows: Tensor) -> Tensor:  # [T, H] -> [B, n, L, d]
        return layout.pad(rows).view(layout.batch_size, layout.sequence_length, num_heads, -1).transpose(1, 2)

    context = F.scaled_dot_product_attention(
        split_heads(query), split_heads(key), split_heads(value), attn_mask=layout.key_mask, dropout_p=dropout
    )
    return layout.pack(context.transpose(1, 2).flatten(2))


@functools.cache
def _varlen_attention() -> Callable[..., Tensor] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn
