"""Word embeddings that the decoder shares: one gradient for both, in place of two that are added.

Shapes: V words of width H; T looked up.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Lookup(torch.autograd.Function):
    """Rows of a matrix, and the matrix as others are to use it: their gradient takes in that of the rows.

    Where a decoder is trained together with the lookup, that saves a matrix of zeros but for few rows, and adding it.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids)
        ctx.shape = weight.shape
        ctx.set_materialize_grads(False)
        return F.embedding(ids, weight), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_rows: Tensor | None, of_weight: Tensor | None) -> tuple[Tensor | None, None]:
        (ids,) = ctx.saved_tensors
        if of_rows is None:
            return of_weight, None
        if of_weight is None:
            of_weight = of_rows.new_zeros(ctx.shape)
        return of_weight.index_add_(0, ids, of_rows), None


class TiedLookup:
    """Look up words in a matrix that a decoder shares, on a CPU; its loss can be differentiated once.

    Args:
        weight: [V, H].

    Attributes:
        weight: the same matrix, as the decoder is to use it after the lookup. Nothing else may use it, as its gradient
            is written to.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, ids: Tensor) -> Tensor:
        """[T] -> [T, H]."""
        rows, self.weight = _Lookup.apply(self.weight, ids)
        return rows
