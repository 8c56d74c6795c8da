"""Layerwise adaptive optimizers."""

from .groups import param_groups
from .lamb import LAMB, NLAMB, NNLAMB
from .lars import LARS

__all__ = ["LAMB", "LARS", "NLAMB", "NNLAMB", "param_groups"]
