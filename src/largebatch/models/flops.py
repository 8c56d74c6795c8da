"""Floating-point operations of training: what MFU is measured by."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .config import BertConfig


def training_flops(
    config: BertConfig, lengths: NDArray[np.integer] | Sequence[int], num_masked: int, *, whole_layers: bool = True
) -> float:
    """Return the operations of one forward and backward pass of BERT over sequences of real tokens.

    Matrix products only, a multiplication and an addition counted as two, the backward pass as two forward passes;
    nothing is counted for padding, or for recomputation. With K layers of width H, feed-forward width I and vocabulary
    V, over sequences of l tokens:

        linear      6 * sum(l)   * K * (4 H^2 + 2 H I)
        attention   6 * sum(l^2) * K * 2 H
        MLM head    6 * num_masked * (H^2 + H V)

    The pooler and the heads with two outputs are left out: under 0.05% at any published size.

    Args:
        config: the model's shape.
        lengths: real tokens of each sequence.
        num_masked: tokens that the masked-language-model head is computed for; 0 in fine-tuning.
        whole_layers: False leaves out what `BertForPreTraining` does, so that no speed is claimed for it: past its
            attention, the last layer is computed for the masked tokens and one token of each sequence alone.

    Returns:
        Floating-point operations. BERT-large: 240.6e9 for a sequence of 128 with 20 masked tokens, 1020.5e9 for one of
        512 with 80.
    """
    real = np.asarray(lengths, dtype=np.float64)
    width, layers = config.hidden_size, config.num_hidden_layers
    linear = real.sum() * layers * (4 * width**2 + 2 * width * config.intermediate_size)
    if not whole_layers:
        unseen = max(0.0, real.sum() - num_masked - len(real))
        linear -= unseen * (width**2 + 2 * width * config.intermediate_size)
    attention = (real**2).sum() * layers * 2 * width
    head = num_masked * (width**2 + width * config.vocab_size)
    return 6 * float(linear + attention + head)


def lenet_training_flops(num_images: int) -> float:
    """Return the operations of one forward and backward pass of :class:`LeNet`.

    Convolutions and matrix products only, a multiplication and an addition counted as two. The backward pass is two
    forward passes, but for the first convolution, whose input needs no gradient.
    """
    first = 28 * 28 * 32 * (5 * 5 * 1)
    others = 14 * 14 * 64 * (5 * 5 * 32) + 7 * 7 * 64 * 1024 + 1024 * 10
    return 2.0 * num_images * (2 * first + 3 * others)
