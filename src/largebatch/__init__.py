"""Train with very large batches: the optimizers, schedules and scaling rules of the LAMB paper.

The public names need torch and numpy and nothing else, and are imported when they are first used: what does without
torch, such as ``largebatch prepare`` and its worker processes, is spared its 1.7 s and 170 MB each (2026-11-21). The
training system behind the ``largebatch`` command lives in the subpackages.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from largebatch import schedules
    from largebatch.optim import LAMB, LARS, NLAMB, NNLAMB, Layerwise, param_groups
    from largebatch.scaling import Plan, Stage, plan

__all__ = ["LAMB", "LARS", "NLAMB", "NNLAMB", "Layerwise", "Plan", "Stage", "param_groups", "plan", "schedules"]

__version__ = "0.1.0"

_MODULES = ("optim", "scaling", "schedules")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "scaling" if name in ("Plan", "Stage", "plan") else "optim"
    return getattr(import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
