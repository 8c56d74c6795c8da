"""Element-wise work around BERT's matrix products, compiled into one kernel each.

On a GPU, bias and GELU, and dropout, residual and LayerNorm are passes over memory that take a third of a layer's time
when each is a kernel of its own.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bert import BertIntermediate, BertOutput
from .dropout import keyed_dropout


def bias_activation(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function of rows [T, I] and a bias [I]: activation(rows + bias), in the rows' dtype."""

    def function(rows: Tensor, bias: Tensor) -> Tensor:
        return activation(rows + bias.to(rows.dtype))

    return function


def dropout_add_norm(
    rows: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    prob: float,
    keys: Tensor | None,
    site: int,
) -> Tensor:
    """LayerNorm(residual + dropout(rows)), [T, H]; the dropout by keys [T] where there are some."""
    if prob > 0:
        rows = F.dropout(rows, prob) if keys is None else keyed_dropout(rows, keys[:, None], site, prob)
    return F.layer_norm(rows + residual, weight.shape, weight, bias, eps)


def compile_elementwise(model: nn.Module, backend: str | Callable[..., object] = "inductor") -> None:
    """Have `torch.compile` fuse the element-wise work of every layer of ``model``, in place.

    Two functions for all layers, compiled at their first call for any number of rows: lengths change with every
    micro-batch and must not compile anything anew. Whatever would break the graph is an error. Matrix products and
    attention stay as they are.

    Made for CUDA. On a CPU compiling takes half a minute or more, and gains nothing over the tuned allocator.

    Args:
        model: any BERT of this package.
        backend: as for `torch.compile`.
    """
    fused = torch.compile(dropout_add_norm, dynamic=True, fullgraph=True, backend=backend)
    activations: dict[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]] = {}
    for part in model.modules():
        if isinstance(part, BertOutput):
            part.fused = fused
        elif isinstance(part, BertIntermediate):
            if part.activation not in activations:
                function = bias_activation(part.activation)
                activations[part.activation] = torch.compile(function, dynamic=True, fullgraph=True, backend=backend)
            part.fused = activations[part.activation]
