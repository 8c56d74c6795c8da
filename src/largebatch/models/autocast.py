"""What autocast makes of matrix products."""

import torch
from torch import Tensor


def product_dtype(rows: Tensor) -> torch.dtype:
    """Return the dtype of a matrix product of such rows here and now."""
    device = rows.device.type
    is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_on else rows.dtype
