"""Layerwise adaptive optimizers."""

from .groups import param_groups
from .lamb import LAMB
from .lars import LARS

__all__ = ["LAMB", "LARS", "param_groups"]
