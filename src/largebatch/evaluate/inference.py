"""What every evaluation needs: a model in evaluation mode, without gradients, in the wanted precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from largebatch.train import DTYPES


@contextmanager
def inference(model: torch.nn.Module, autocast: str = "fp32") -> Iterator[torch.device]:
    """Turn dropout and gradients off inside the block, and restore each module's mode after it.

    Args:
        model: any module with parameters; the block gets the device of the first of them.
        autocast: "fp32", or "bf16" or "fp16" for matrix products in that dtype, as in the engine.

    Raises:
        ValueError: an unknown `autocast`.
    """
    if autocast not in DTYPES:
        raise ValueError(f"autocast must be 'fp32', 'bf16' or 'fp16', got {autocast!r}")
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]  # parts may have been frozen one by one
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, DTYPES[autocast], enabled=autocast != "fp32"):
            yield device
    finally:
        for module, training in modes:
            module.training = training
