"""Parameter groups by name: which layers decay and adapt, and which do neither."""

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

# What the paper's authors exclude from both the weight decay and the trust ratio of BERT: biases, and the gains of
# normalisation layers, which Hugging Face calls `LayerNorm` and torch `norm1`.
DEFAULT_EXCLUDE = ("bias", "LayerNorm", "norm")

ENDS_IN_NORM = re.compile(r"norm(\d+d)?$", re.IGNORECASE)  # LayerNorm, BatchNorm2d, LlamaRMSNorm, ...
HAS_NORM = re.compile(r"Norm(?![a-z])")  # EvoNorm2dS0, MambaRMSNormGated, but also NormLinear, whose weight is a matrix


def param_groups(
    model: nn.Module, weight_decay: float = 0.01, exclude: Sequence[str] = DEFAULT_EXCLUDE
) -> list[dict[str, Any]]:
    r"""Split a model's parameters into a group that decays and adapts and a group that does neither.

    The excluded group has ``weight_decay=0`` and ``adapt=False``: it takes the plain step of the base optimizer, as the
    authors' own BERT code does for biases and LayerNorm. The groups suit every optimizer of this package, and those
    of ``torch.optim`` that take groups of any parameters; they ignore ``adapt``. What a group says wins over what
    the optimizer is given: the decay is this function's to set, not ``LAMB(groups, weight_decay=...)``'s.

    Args:
        model: the parameters that require a gradient are taken, in the model's order, tied ones once and under their
            first name; names travel along, so that `trust_ratios()` can report them.
        weight_decay: the decay λ of the first group.
        exclude: patterns. A parameter is excluded if any of them is found (``re.search``: case-sensitive, anywhere)
            in its name, or in another name that a tied parameter goes by. The pattern ``"norm"`` also stands for every
            parameter of a normalisation module, whatever its name, so that a ResNet's ``bn1`` and ``downsample.1``
            are excluded: of a module whose class, or one of torch's that it derives from, is called so ("LayerNorm",
            "BatchNorm2d"), and the vectors of one with "Norm" anywhere in these names.

    Returns:
        One or two groups with the keys ``params``, ``param_names``, ``weight_decay`` and ``adapt``; a group that would
        be empty is left out.

    Raises:
        ValueError: a pattern that matches no parameter (unless ``exclude`` is the default, which is meant for models
            of every kind), a negative ``weight_decay``, or a model without parameters to train.

    Example:
        >>> import torch
        >>> model = torch.nn.TransformerEncoderLayer(d_model=8, nhead=2, dim_feedforward=16)
        >>> adapted, excluded = param_groups(model, weight_decay=0.01)
        >>> adapted["param_names"]
        ['self_attn.in_proj_weight', 'self_attn.out_proj.weight', 'linear1.weight', 'linear2.weight']
        >>> excluded["weight_decay"], excluded["adapt"]
        (0.0, False)

    Source: section 4 of the paper leaves this to the code; the authors' BERT code excludes LayerNorm and bias.
    """
    if isinstance(exclude, str):
        raise ValueError(f'exclude={exclude!r}: expected a sequence of patterns, such as ("{exclude}",)')
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay={weight_decay}: expected a number >= 0")

    names: dict[nn.Parameter, list[str]] = {}
    gains: set[nn.Parameter] = set()
    for module_name, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            names.setdefault(parameter, []).append(f"{module_name}.{name}".removeprefix("."))
            if normalises(module, parameter):
                gains.add(parameter)

    def matches(pattern: str, parameter: nn.Parameter) -> bool:
        by_name = any(re.search(pattern, name) for name in names[parameter])
        return by_name or (pattern == "norm" and parameter in gains)

    if tuple(exclude) != DEFAULT_EXCLUDE:
        for pattern in exclude:
            if not any(matches(pattern, parameter) for parameter in names):
                some = ", ".join(known[0] for known in list(names.values())[:3])
                raise ValueError(f"exclude={pattern!r} matches no parameter; their names are like {some}")

    adapted: dict[str, Any] = {"params": [], "param_names": [], "weight_decay": weight_decay, "adapt": True}
    excluded: dict[str, Any] = {"params": [], "param_names": [], "weight_decay": 0.0, "adapt": False}
    for parameter, known in names.items():
        if parameter.requires_grad:
            group = excluded if any(matches(pattern, parameter) for pattern in exclude) else adapted
            group["params"].append(parameter)
            group["param_names"].append(known[0])
    groups = [group for group in (adapted, excluded) if group["params"]]
    if not groups:
        raise ValueError("model: it has no parameter that requires a gradient")
    return groups


def normalises(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Say whether a parameter of this module is the gain or the shift of a normalisation."""
    own, *inherited = type(module).__mro__
    known = [own, *(kind for kind in inherited if kind.__module__.startswith("torch.nn."))]
    if any(ENDS_IN_NORM.search(kind.__name__) for kind in known):
        return True
    is_vector = parameter.numel() == max(parameter.shape, default=1)
    return is_vector and any(HAS_NORM.search(kind.__name__) for kind in (own, *inherited))
