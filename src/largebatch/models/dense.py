"""The dense parts of a layer, in which a kernel in C does all but the matrix product in one pass over memory on a CPU.

Shapes: T rows, the real tokens; H columns of the result.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import native
from .autocast import product_dtype
from .dropout import Dropout


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Say whether a module does what its class says and no more, so that its weights may be used without calling it.

    Not so with hooks (of pruning, of `spectral_norm`, of a user who looks on), nor with a ``forward`` of its own.
    """
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return type(module) is kind and not any(hooks) and "forward" not in vars(module)


class _Gelu(torch.autograd.Function):
    """By the kernel, which adds the bias anew in the backward pass."""

    @staticmethod
    def forward(ctx: Any, products: Tensor, bias: Tensor, kernel: native.Kernel) -> Tensor:
        ctx.save_for_backward(products, bias)
        ctx.kernel = kernel
        return kernel.gelu(products, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.kernel.gelu_backward(grad.contiguous(), *ctx.saved_tensors), None


def dense_activation(rows: Tensor, dense: nn.Linear, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """activation(dense(rows)), [T, H]: GELU in C where the product is bfloat16 on a CPU, else by torch's operations.

    The kernel's GELU is right to 1e-6 and its slope to 2e-6, which bfloat16 does not tell; float32 is left to torch.
    """
    kernel = _kernel_for(dense, rows) if activation is F.gelu else None
    if kernel is None or product_dtype(rows) is not torch.bfloat16:
        return activation(dense(rows))
    activated: Tensor = _Gelu.apply(F.linear(rows, dense.weight), dense.bias, kernel)
    return activated


class _AddNorm(torch.autograd.Function):
    """By the kernel, which draws the masks anew in the backward pass and keeps what LayerNorm keeps."""

    @staticmethod
    def forward(
        ctx: Any,
        products: Tensor,
        products_bias: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor,
        keys: Tensor,
        kernel: native.Kernel,
        site: int,
        prob: float,
        eps: float,
    ) -> Tensor:
        total, moments, normed = kernel.add_norm(products, products_bias, residual, weight, bias, keys, site, prob, eps)
        ctx.save_for_backward(weight, keys, total, moments)
        ctx.kernel, ctx.site, ctx.prob, ctx.dtype = kernel, site, prob, products.dtype
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, keys, total, moments = ctx.saved_tensors
        grads = ctx.kernel.add_norm_backward(
            grad.contiguous(), weight, keys, total, moments, ctx.site, ctx.prob, ctx.dtype
        )
        return *grads, None, None, None, None, None


def dense_dropout_add_norm(
    rows: Tensor, dense: nn.Linear, residual: Tensor, dropout: Dropout, norm: nn.LayerNorm, keys: Tensor | None
) -> Tensor:
    """LayerNorm(residual + dropout(dense(rows))), [T, H]: in C in training with the keys [T], else by torch."""
    is_keyed = dropout.training and keys is not None
    is_plain_norm = is_keyed and is_plain(norm, nn.LayerNorm)
    kernel = _kernel_for(dense, rows, residual, norm.weight, norm.bias) if is_plain_norm else None
    if kernel is None:
        normed: Tensor = norm(dropout(dense(rows), keys) + residual)
        return normed
    result: Tensor = _AddNorm.apply(
        F.linear(rows, dense.weight),
        dense.bias,
        residual,
        norm.weight,
        norm.bias,
        keys,
        kernel,
        dropout.site,
        dropout.p,
        norm.eps,
    )
    return result


class _JointProducts(torch.autograd.Function):
    """Rows times the weights of several layers, side by side."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, *weights: Tensor) -> Tensor:
        joined = torch.cat([weight.to(rows.dtype) for weight in weights])
        # Where nothing was narrowed the copy is made anew in the backward pass, and not kept.
        ctx.save_for_backward(rows, *(weights if weights[0].dtype is rows.dtype else [joined]))
        ctx.shapes = [(len(weight), weight.dtype) for weight in weights]
        return F.linear(rows, joined)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, *weights = ctx.saved_tensors
        of_rows, of_weights = None, [None] * len(ctx.shapes)
        if ctx.needs_input_grad[0]:
            of_rows = grad @ (weights[0] if len(weights) == 1 else torch.cat(weights))
        if any(ctx.needs_input_grad[1:]):
            sizes, dtypes = zip(*ctx.shapes, strict=True)
            parts = (grad.t() @ rows).split(sizes)
            of_weights = [part.to(dtype) for part, dtype in zip(parts, dtypes, strict=True)]
        return of_rows, *of_weights


def joint_products(rows: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, Tensor | None]:
    """Return the products of ``rows`` with the weights of all layers, side by side, and the biases yet to be added.

    One matrix product in place of each layer's own, and one for the gradient of the rows, which need not be summed.
    Where one is not a plain linear layer (`is_plain`) with a bias: the outputs of all, and None.
    """
    linear = [layer for layer in layers if is_plain(layer, nn.Linear) and layer.bias is not None]
    if len(linear) < len(layers):
        return torch.cat([layer(rows) for layer in layers], -1), None
    products: Tensor = _JointProducts.apply(rows, *(layer.weight for layer in linear))
    return products, torch.cat([layer.bias for layer in linear])


def _kernel_for(dense: nn.Linear, rows: Tensor, *others: Tensor | None) -> native.Kernel | None:
    """Return the kernel if it can take over after the product of ``rows`` and the weights, before their bias."""
    if not is_plain(dense, nn.Linear) or rows.device.type != "cpu":
        return None
    kernel = native.kernel()
    if kernel is None or not kernel.takes_products(rows, dense.weight, dense.bias, *others):
        return None
    return kernel
