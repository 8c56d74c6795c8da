"""Layerwise adaptive optimizers: `LAMB`, `LARS`, `NLAMB`, `NNLAMB`, and `Layerwise` for any other optimizer."""

from .dialects import convert_state_dict
from .groups import param_groups
from .lamb import LAMB, NLAMB, NNLAMB
from .lars import LARS
from .layerwise import Layerwise
from .norms import flat_partition

__all__ = ["LAMB", "LARS", "NLAMB", "NNLAMB", "Layerwise", "convert_state_dict", "flat_partition", "param_groups"]
