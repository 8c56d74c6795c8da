"""Padding dropped and put back: the packed rows of real tokens of a micro-batch, and attention over them.

Shapes: B sequences of padded length L; T real tokens; H the model's width; n heads of width d.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dense import joint_products
from .dropout import Dropout, row_keys
from .keyed_attention import keyed_attention


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
    On the CPU the sequences are ordered by length, so that those of one length are one block for the attention.
    It is made once a micro-batch and serves every layer.

    Args:
        attention_mask: [B, L], true where a token is real. The first position of every sequence must be real.
        unpad: whether to drop the padding.
        dropout_keys: [B] int64, of which the dropout masks are functions; None leaves them to torch's generator.

    Attributes:
        token_index: [T] the position, flat into B * L, of each row; None where the rows are all positions in order.
        positions: [T] the place of each row's token in its sequence.
        first_rows: [B] the row of each sequence's first token, [CLS].
        blocks: (number of sequences, their length) of each run of rows with one length; None on devices where finding
            out would stall the queue, and without ``unpad``.

    Raises:
        ValueError: if a sequence does not begin with a real token (checked on the CPU only, as elsewhere the check
            would stall the device).
    """

    def __init__(self, attention_mask: Tensor, *, unpad: bool = True, dropout_keys: Tensor | None = None) -> None:
        self.mask = attention_mask.bool()
        self._dropout_keys = dropout_keys
        self.batch_size, self.sequence_length = self.mask.shape
        self.num_positions = self.batch_size * self.sequence_length
        device = self.mask.device
        self._on_cpu = device.type == "cpu"
        if self._on_cpu and not bool(self.mask[:, 0].all()):
            row = int((~self.mask[:, 0]).nonzero()[0])
            raise ValueError(f"attention_mask: sequence {row} begins with padding; padding must come at the end")

        starts = torch.arange(self.batch_size, device=device) * self.sequence_length
        self.token_index: Tensor | None = None
        self.blocks: list[tuple[int, int]] | None = None
        if unpad and self._on_cpu:
            lengths, order = self.mask.sum(1).sort(stable=True)
            rows, columns = self.mask[order].nonzero(as_tuple=True)
            self.token_index = starts[order][rows] + columns
            values, counts = lengths.unique_consecutive(return_counts=True)
            self.blocks = list(zip(counts.tolist(), values.tolist(), strict=True))
        elif unpad:
            self.token_index = self.mask.flatten().nonzero().squeeze(1)

        every_position = torch.arange(self.num_positions, device=device)
        if self.token_index is None:
            self._row_of_position = every_position
            self.positions = every_position % self.sequence_length
        else:
            num_rows = self.token_index.shape[0]
            self._row_of_position = every_position.index_copy(0, self.token_index, every_position[:num_rows])
            self.positions = self.token_index % self.sequence_length
        self.first_rows = self._row_of_position[starts]

    def pack(self, padded: Tensor) -> Tensor:
        """Drop the padding: [B, L, ...] -> [T, ...]."""
        flat = padded.reshape(self.num_positions, *padded.shape[2:])
        return flat if self.token_index is None else _PickRows.apply(flat, self.token_index)

    def pad(self, rows: Tensor) -> Tensor:
        """Put the padding back, as zeros: [T, ...] -> [B, L, ...]."""
        if self.token_index is not None:
            rows = _SpreadRows.apply(rows, self.token_index, self.num_positions)
        return rows.reshape(self.batch_size, self.sequence_length, *rows.shape[1:])

    def rows_at(self, positions: Tensor) -> Tensor:
        """Translate positions of real tokens, flat into B * L, to rows.

        Raises:
            ValueError: if a position is padding or outside the micro-batch (checked on the CPU only).
        """
        if self._on_cpu and positions.numel():
            if int(positions.min()) < 0 or int(positions.max()) >= self.num_positions:
                raise ValueError(f"positions: some lie outside the {self.num_positions} of the micro-batch")
            if not bool(self.mask.flatten()[positions].all()):
                raise ValueError("positions: some point at padding")
        return self._row_of_position[positions]

    @functools.cached_property
    def row_keys(self) -> Tensor | None:
        """[T] int32: of which the dropout masks of each row are functions; None if there are no such keys."""
        if self._dropout_keys is None:
            return None
        keys = self.pack(self._dropout_keys[:, None].expand(-1, self.sequence_length))
        return row_keys(keys, self.positions)

    def keys_of(self, rows: Tensor | None) -> Tensor | None:
        """Return the keys of some rows; None means all."""
        return self.row_keys if rows is None or self.row_keys is None else self.row_keys[rows]

    @functools.cached_property
    def key_mask(self) -> Tensor:
        """[B, 1, 1, L] for ``scaled_dot_product_attention``."""
        return self.mask[:, None, None, :]

    @functools.cached_property
    def offsets(self) -> Tensor:
        """[B + 1] int64: the row at which each sequence begins, and at the end T."""
        lengths = self.mask.sum(1)
        return F.pad((lengths.sort()[0] if self.blocks is not None else lengths).cumsum(0), (1, 0))

    @functools.cached_property
    def offsets32(self) -> Tensor:
        """The same in int32, as kernels take them."""
        return self.offsets.to(torch.int32)


def self_attention(
    rows: Tensor, projections: Sequence[nn.Module], num_heads: int, layout: TokenLayout, dropout: Dropout | None
) -> Tensor:
    """Attention of each sequence over itself, from the rows of which three layers make query, key and value.

    [T, H] -> [T, H]: `attention`, but for dropout by keys on a CPU, where the products of the three layers are one, and
    the probabilities are made a part at a time.
    """
    if layout.blocks is None or layout.row_keys is None or dropout is None:
        return attention(*(layer(rows) for layer in projections), num_heads, layout, dropout)
    products, bias = joint_products(rows, projections)
    return keyed_attention(products, bias, num_heads, layout.blocks, layout.row_keys, dropout.site, dropout.p)


def attention(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int, layout: TokenLayout, dropout: Dropout | None = None
) -> Tensor:
    """Scaled dot-product attention of each sequence over itself, on rows: [T, H] -> [T, H].

    On the CPU each block of sequences of one length is one call without mask or padding. In half precision on CUDA
    all sequences are one call of flash attention (`_packed_attention`). All else (CUDA in fp32, and ``unpad=False``) is
    padded around ``scaled_dot_product_attention`` with a mask over the keys. Dropout by keys needs the matrix of
    probabilities.
    """
    is_keyed = dropout is not None and layout.row_keys is not None
    prob = 0.0 if dropout is None else dropout.p
    if layout.blocks is not None and not is_keyed:
        return _block_attention(query, key, value, num_heads, layout.blocks, prob)
    if layout.token_index is not None and not is_keyed and _flash_takes(query, num_heads):
        return _packed_attention(query, key, value, num_heads, layout, prob, _varlen_attention())

    def split_heads(rows: Tensor) -> Tensor:  # [T, H] -> [B, n, L, d]
        return layout.pad(rows).view(layout.batch_size, layout.sequence_length, num_heads, -1).transpose(1, 2)

    row_keys = None if dropout is None or layout.row_keys is None else layout.pad(layout.row_keys)
    per_head = (split_heads(query), split_heads(key), split_heads(value))
    context = _attention_of_heads(*per_head, dropout, row_keys, layout.key_mask)
    return layout.pack(context.transpose(1, 2).flatten(2))


def _attention_of_heads(
    query: Tensor, key: Tensor, value: Tensor, dropout: Dropout | None, row_keys: Tensor | None, mask: Tensor
) -> Tensor:
    """Attention on [B, n, L, d], with dropout by the keys of the rows [B, L] where there are some."""
    if dropout is None or row_keys is None:
        prob = 0.0 if dropout is None else dropout.p
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=prob)
    scores = (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).masked_fill(~mask, float("-inf"))
    return dropout.attention(scores.softmax(-1), row_keys) @ value


def _block_attention(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int, blocks: list[tuple[int, int]], dropout_prob: float
) -> Tensor:
    """Attention block by block.

    Measured 2026-11-21, 1 core (Zen 3), forward and backward against one padded and masked call: 0.94x the time on 64
    sequences of BERT's lengths at 128, 0.21x-0.36x on lengths uniform in 5..512; jagged nested tensors took 2.3x-3.4x.
    """
    sizes = [count * length for count, length in blocks]
    contexts = []
    for (count, length), *per_block in zip(
        blocks, query.split(sizes), key.split(sizes), value.split(sizes), strict=True
    ):
        per_head = (rows.view(count, length, num_heads, -1).transpose(1, 2) for rows in per_block)
        context = F.scaled_dot_product_attention(*per_head, dropout_p=dropout_prob)
        contexts.append(context.transpose(1, 2).reshape(count * length, -1))
    return contexts[0] if len(contexts) == 1 else torch.cat(contexts)


def _packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    layout: TokenLayout,
    dropout_prob: float,
    varlen: Callable[..., Tensor] | None,
) -> Tensor:
    """Attention of all sequences as they lie one behind the other, in one call: of ``varlen``, or nested tensors.

    The two lead to the same kernel, but a call with nested tensors costs the host some 2 ms, and its backward pass
    2 ms more (one Zen 4 core, torch 2.13, 2026-11-30): more than a layer takes a GPU.
    """
    per_head = [rows.view(len(rows), num_heads, -1) for rows in (query, key, value)]
    longest = layout.sequence_length
    if varlen is not None:
        return varlen(*per_head, layout.offsets32, layout.offsets32, longest, longest, dropout_prob).flatten(1)
    nested = [
        torch.nested.nested_tensor_from_jagged(rows, layout.offsets, min_seqlen=1, max_seqlen=longest).transpose(1, 2)
        for rows in per_head  # the two bounds spare the queue a stall
    ]
    return F.scaled_dot_product_attention(*nested, dropout_p=dropout_prob).transpose(1, 2).values().flatten(1)


def _flash_takes(query: Tensor, num_heads: int) -> bool:
    """Say whether PyTorch has flash attention for these rows: Ampere or newer, half precision."""
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    return query.shape[1] // num_heads % 8 == 0 and torch.cuda.get_device_capability(query.device) >= (8, 0)


@functools.cache
def _varlen_attention() -> Callable[..., Tensor] | None:
    """Flash attention over packed rows, where the version has it.

    It is what ``torch.nn.attention.varlen.varlen_attn`` calls without dropout, and nested tensors with it.
    """
    flash = getattr(torch.ops.aten, "_flash_attention_forward", None)
    if flash is None:
        return None
    return lambda *arguments: flash(*arguments, False, False)[0]  # neither causal nor for debugging
