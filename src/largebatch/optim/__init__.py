"""Layerwise adaptive optimizers: `LAMB`, `LARS`, `NLAMB`, `NNLAMB`, and `Layerwise` for any other optimizer."""

from .dialects import convert_state_dict
from .groups import param_groups
from .in_backward import optimizer_in_backward
from .lamb import LAMB, NLAMB, NNLAMB
from .lars import LARS
from .layerwise import Layerwise
from .norms import flat_partition
from .offload import CPUOffload

__all__ = [
    "LAMB",
    "LARS",
    "NLAMB",
    "NNLAMB",
    "CPUOffload",
    "Layerwise",
    "convert_state_dict",
    "flat_partition",
    "optimizer_in_backward",
    "param_groups",
]
