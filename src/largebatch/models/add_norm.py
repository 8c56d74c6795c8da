"""The end of both halves of a layer, LayerNorm(residual + dropout(rows)), in one pass over memory on a CPU.

Shapes: T rows, the real tokens; H columns.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import native
from .dropout import Dropout


class _AddNorm(torch.autograd.Function):
    """By the C kernel, which draws the masks anew in the backward pass and keeps what LayerNorm keeps."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor,
        keys: Tensor,
        kernel: native.Kernel,
        site: int,
        prob: float,
        eps: float,
    ) -> Tensor:
        total, moments, normed = kernel.add_norm(rows, residual, weight, bias, keys, site, prob, eps)
        ctx.save_for_backward(weight, keys, total, moments)
        ctx.kernel, ctx.site, ctx.prob, ctx.dtype = kernel, site, prob, rows.dtype
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, keys, total, moments = ctx.saved_tensors
        grads = ctx.kernel.add_norm_backward(
            grad.contiguous(), weight, keys, total, moments, ctx.site, ctx.prob, ctx.dtype
        )
        return *grads, None, None, None, None, None


def dropout_add_norm(
    rows: Tensor, residual: Tensor, dropout: Dropout, norm: nn.LayerNorm, keys: Tensor | None
) -> Tensor:
    """[T, H], [T, H] -> [T, H]: in C in training on a CPU with the keys [T], else by torch's operations."""
    kernel = native.kernel() if dropout.training and keys is not None else None
    if kernel is None or not kernel.takes_norm(rows, residual, norm.weight, norm.bias):
        normed: Tensor = norm(dropout(rows, keys) + residual)
        return normed
    result: Tensor = _AddNorm.apply(
        rows, residual, norm.weight, norm.bias, keys, kernel, dropout.site, dropout.p, norm.eps
    )
    return result
