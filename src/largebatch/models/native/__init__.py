"""The CPU kernel of BERT, in C: what lies between its matrix products, each in one pass over memory.

setup.py compiles it when the package is installed. attention.c, norm.c, gelu.c and loss.c have the arithmetic, calls.c
the division among threads. The same bits come out on any number of threads. Where it is missing, and for what it does
not take, torch's operations do the same.
"""

import ctypes
import functools
import logging
from pathlib import Path

import torch
from torch import Tensor

from largebatch import compiled

from ..autocast import product_dtype
from ..dropout import scale_of, threshold

_ADDRESS, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_MASK = [_ADDRESS, ctypes.c_uint32, _INT]  # keys, site, threshold
# Of the functions in calls.c.
_SIGNATURES: dict[str, list[type]] = {
    "softmax": [_LONG] * 3 + [_INT, *_MASK] + [_ADDRESS] * 2 + [_INT],
    "softmax_backward": [_LONG] * 2 + [_INT] + [_ADDRESS] * 3 + [_INT],
    "heads": [_INT] + [_LONG] * 5 + [_INT, _FLOAT] + [_ADDRESS] * 4 + [_INT],
    "add_norm": [_LONG] * 2 + [_INT, *_MASK] + [_FLOAT] * 2 + [_ADDRESS] * 8 + [_INT],
    "add_norm_backward": [_LONG] * 2 + [_INT, *_MASK] + [_FLOAT] + [_ADDRESS] * 7 + [_INT],
    "gelu": [_LONG] * 2 + [_ADDRESS] * 3 + [_INT],
    "gelu_backward": [_LONG] * 2 + [_ADDRESS] * 5 + [_INT],
    "loss": [_LONG] * 2 + [_INT] + [_ADDRESS] * 6 + [_INT],
}


class Kernel:
    """The library's functions, on tensors that are contiguous but where something else is said.

    Shapes: c sequences of L tokens, n heads of width d; T rows of H columns.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, types in _SIGNATURES.items():
            function = getattr(library, f"largebatch_{name}")
            function.argtypes, function.restype = types, None
        self.library = library
        self.max_length: int = library.largebatch_max_length()
        self.heads_rows: int = library.largebatch_heads_rows()
        self.norm_rows: int = library.largebatch_norm_rows()
        self.gelu_rows: int = library.largebatch_gelu_rows()
        self.loss_rows: int = library.largebatch_loss_rows()

    def takes_attention(self, rows: Tensor, longest: int) -> bool:
        """Say whether it can do the attention of such rows."""
        return _is_plain(rows) and _is_narrow(rows.dtype) is not None and longest <= self.max_length

    def takes_products(self, rows: Tensor, *others: Tensor | None) -> bool:
        """Say whether it can go on from a matrix product of such rows, with ``others``."""
        if not _is_plain(rows) or _is_narrow(product_dtype(rows)) is None:
            return False
        return all(each is not None and _is_plain(each) and each.dtype is torch.float32 for each in others)

    def softmax(self, scores: Tensor, keys: Tensor, site: int, keep_prob: float) -> Tensor:
        """See `Operations.softmax`."""
        dropped = torch.empty_like(scores)
        keys = _readable("keys", keys, torch.int32, len(scores), scores.shape[2])
        self.library.largebatch_softmax(
            *scores.shape[:3],
            _is_narrow(scores.dtype),
            keys.data_ptr(),
            site,
            threshold(keep_prob),
            scores.data_ptr(),
            dropped.data_ptr(),
            torch.get_num_threads(),
        )
        return dropped

    def softmax_backward(self, grads: Tensor, probs: Tensor) -> Tensor:
        """See `Operations.softmax_backward`."""
        dropped = torch.empty_like(probs)
        length = probs.shape[-1]
        self.library.largebatch_softmax_backward(
            probs.numel() // length,
            length,
            _is_narrow(probs.dtype),
            grads.data_ptr(),
            probs.data_ptr(),
            dropped.data_ptr(),
            torch.get_num_threads(),
        )
        return dropped

    def split(self, rows: Tensor, bias: Tensor | None, chunk: tuple[int, int], num_heads: int, scale: float) -> Tensor:
        """See `Operations.split`; the rows may lie apart."""
        heads = rows.new_empty(chunk[0] * num_heads, chunk[1], rows.shape[1] // num_heads)
        if bias is not None:
            bias = _readable("bias", bias, torch.float32, rows.shape[1])
        self._copy(0, rows, heads, chunk, num_heads, scale, bias, None)
        return heads

    def join(self, heads: Tensor, rows: Tensor, chunk: tuple[int, int], num_heads: int, scale: float) -> None:
        """See `Operations.join`; the rows may lie apart."""
        self._copy(1, rows, heads, chunk, num_heads, scale, None, None)

    def join_and_sum(self, heads: Tensor, rows: Tensor, chunk: tuple[int, int], num_heads: int, scale: float) -> Tensor:
        """See `Operations.join_and_sum`; the rows may lie apart."""
        sums = rows.new_empty(-(-len(rows) // self.heads_rows), rows.shape[1], dtype=torch.float32)
        self._copy(1, rows, heads, chunk, num_heads, scale, None, sums)
        return sums.sum(0)

    def _copy(
        self,
        joins: int,
        rows: Tensor,
        heads: Tensor,
        chunk: tuple[int, int],
        num_heads: int,
        scale: float,
        bias: Tensor | None,
        sums: Tensor | None,
    ) -> None:
        self.library.largebatch_heads(
            joins,
            chunk[0],
            num_heads,
            chunk[1],
            heads.shape[2],
            rows.stride(0),
            _is_narrow(rows.dtype),
            scale,
            *(None if each is None else each.data_ptr() for each in (rows, heads, bias, sums)),
            torch.get_num_threads(),
        )

    def add_norm(
        self,
        products: Tensor,
        products_bias: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor,
        keys: Tensor,
        site: int,
        prob: float,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return residual + dropout(products + their bias), of its rows mean and inverse deviation [T, 2], and its
        LayerNorm."""
        products, width = products.contiguous(), products.shape[1]
        keys = _readable("keys", keys, torch.int32, len(products))
        residual = _readable("residual", residual, torch.float32, *products.shape)
        named = {"products_bias": products_bias, "weight": weight, "bias": bias}
        products_bias, weight, bias = (_readable(name, x, torch.float32, width) for name, x in named.items())
        total, normed = torch.empty_like(residual), torch.empty_like(residual)
        moments = residual.new_empty(len(products), 2)
        kept, scale = _of_dropout(prob)
        self.library.largebatch_add_norm(
            *products.shape,
            _is_narrow(products.dtype),
            keys.data_ptr(),
            site,
            kept,
            scale,
            eps,
            *(x.data_ptr() for x in (products, products_bias, residual, weight, bias, total, moments, normed)),
            torch.get_num_threads(),
        )
        return total, moments, normed

    def add_norm_backward(
        self,
        grad: Tensor,
        weight: Tensor,
        keys: Tensor,
        total: Tensor,
        moments: Tensor,
        site: int,
        prob: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the gradients of the products, which have ``dtype``, of their bias, the residual, weight and bias."""
        of_products, of_residual = torch.empty_like(grad, dtype=dtype), torch.empty_like(grad)
        keys = _readable("keys", keys, torch.int32, len(grad))
        weight = _readable("weight", weight, torch.float32, grad.shape[1])
        of_params = grad.new_empty(-(-len(grad) // self.norm_rows), 3, grad.shape[1])
        kept, scale = _of_dropout(prob)
        self.library.largebatch_add_norm_backward(
            *grad.shape,
            _is_narrow(dtype),
            keys.data_ptr(),
            site,
            kept,
            scale,
            *(each.data_ptr() for each in (weight, total, moments, grad, of_products, of_residual, of_params)),
            torch.get_num_threads(),
        )
        of_weight, of_bias, of_products_bias = of_params.sum(0)
        return of_products, of_products_bias, of_residual, of_weight, of_bias

    def gelu(self, products: Tensor, bias: Tensor) -> Tensor:
        """GELU(products + bias), [T, H] of bfloat16 and [H]."""
        activated = torch.empty_like(products)
        bias = _readable("bias", bias, torch.float32, products.shape[1])
        self.library.largebatch_gelu(
            *products.shape,
            *(each.data_ptr() for each in (products, bias, activated)),
            torch.get_num_threads(),
        )
        return activated

    def gelu_backward(self, grad: Tensor, products: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of products and bias."""
        of_products = torch.empty_like(products)
        bias = _readable("bias", bias, torch.float32, products.shape[1])
        of_bias = bias.new_empty(-(-len(grad) // self.gelu_rows), grad.shape[1])
        self.library.largebatch_gelu_backward(
            *grad.shape,
            *(each.data_ptr() for each in (products, bias, grad, of_products, of_bias)),
            torch.get_num_threads(),
        )
        return of_products, of_bias.sum(0)

    def loss(self, products: Tensor, bias: Tensor, labels: Tensor, wants_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
        """See `cross_entropy.loss`."""
        num_rows, num_classes = products.shape
        labels = _readable("labels", labels, torch.int64, num_rows)
        bias = _readable("bias", bias, torch.float32, num_classes)
        if num_rows and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise IndexError(f"labels: from {int(labels.min())} to {int(labels.max())}, outside 0..{num_classes - 1}")
        losses, right = bias.new_empty(num_rows), bias.new_empty(num_rows, dtype=torch.uint8)
        of_bias = bias.new_empty(-(-num_rows // self.loss_rows) if wants_grad else 0, num_classes)
        self.library.largebatch_loss(
            num_rows,
            num_classes,
            _is_narrow(products.dtype),
            *(each.data_ptr() for each in (products, bias, labels, losses, right)),
            of_bias.data_ptr() if wants_grad else None,
            torch.get_num_threads(),
        )
        return losses.sum(), right.sum(), of_bias.sum(0)


def _readable(name: str, x: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """Return what C, which cannot check it, reads as this: numbers in the CPU's memory, one behind the other."""
    if x.shape != shape:
        raise ValueError(f"{name}: shape {list(x.shape)}, but {list(shape)} is needed")
    if x.device.type != "cpu":
        raise ValueError(f"{name}: on {x.device}, but the others are on the CPU")
    return x.to(dtype).contiguous()


def _of_dropout(prob: float) -> tuple[int, float]:
    """Return the threshold, which is above all 16 bits where nothing is dropped, and the scale."""
    return (threshold(1 - prob), scale_of(1 - prob)) if prob > 0 else (1 << 16, 1.0)


def _is_narrow(dtype: torch.dtype) -> bool | None:
    """Say whether numbers are bfloat16 and not float32; None for others."""
    return {torch.float32: False, torch.bfloat16: True}.get(dtype)


def _is_plain(x: Tensor) -> bool:
    """Say whether these are numbers in memory, and not a stand-in for some elsewhere or of a compiler."""
    return type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" and not torch.compiler.is_compiling()


@functools.cache
def kernel() -> Kernel | None:
    """Return the kernel, or say once that it is missing."""
    try:
        return Kernel(compiled.load(Path(__file__).parent))
    except ImportError as error:
        logging.getLogger(__name__).warning("BERT on the CPU runs on torch operations, more slowly: %s", error)
        return None
