"""Train with very large batches: the optimizers, schedules and scaling rules of the LAMB paper.

Importing this package imports torch and numpy and nothing else; the training system behind the
``largebatch`` command lives in the subpackages and is imported when it is used.
"""

from largebatch import schedules
from largebatch.optim import LAMB, LARS, NLAMB, NNLAMB, Layerwise, param_groups
from largebatch.scaling import Plan, Stage, plan

__all__ = ["LAMB", "LARS", "NLAMB", "NNLAMB", "Layerwise", "Plan", "Stage", "param_groups", "plan", "schedules"]

__version__ = "0.1.0"
