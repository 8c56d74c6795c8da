"""What other packages mean by LAMB, as arguments of ours; and their state dicts, read into ours.

Packages of that name differ by up to a factor of ten in the length of a step. docs/dialects.md is the table of how,
with the sources; each dialect here is compared in the tests with the package it names, where that runs on a CPU.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from .checks import check

# Settings that differ from the paper's, which are bias_correction=True, weight_decay=0.01, eps=1e-6 and φ the identity.
DIALECTS: dict[str, dict[str, Any]] = {
    "paper": {},  # v1, v4 and v5
    "paper-v3": {"bias_correction": False},
    "albert": {"bias_correction": False},  # with LayerNorm and biases neither decayed nor adapted: `param_groups`
    "tfa": {"weight_decay": 0.0},
    "optax": {"weight_decay": 0.0},
    "keras": {"weight_decay": 0.0, "eps": 1e-7, "decoupled_weight_decay": True},
    "apex": {"always_adapt": False},  # after clipping the gradient's global norm to 1
    "nvlamb": {},  # Apex with use_nvlamb=True, after the same clipping
    "timm": {"always_adapt": False},  # after the same clipping
    "lambc": {"always_adapt": False, "ratio_bounds": (0.0, 1.0)},  # timm with trust_clip=True
    "deepspeed": {"bias_correction": "folded", "weight_decay": 0.0, "eps": 1e-8, "ratio_bounds": (0.01, 10.0)},
    "colossalai": {"bias_correction": False, "weight_decay": 0.0},
    "torch_optimizer": {"bias_correction": False, "weight_decay": 0.0, "phi": (0.0, 10.0)},
    "torch_optimizer-debias": {"bias_correction": "folded", "weight_decay": 0.0, "phi": (0.0, 10.0)},
    "cybertronai": {"bias_correction": False, "weight_decay": 0.0, "phi": (0.0, 10.0)},
}


def dialect(name: str) -> dict[str, Any]:
    """Return the arguments with which LAMB takes the same steps as another implementation.

    They are that implementation's defaults for everything but the learning rate. What a package does outside of the
    rule is not in them: Apex and timm clip the gradient's global norm to 1 before the step
    (``torch.nn.utils.clip_grad_norm_``), and exclusions are a matter of groups: `param_groups` sets λ for each, which
    wins over the λ here, so hand it this one.

    Args:
        name: "paper" (v1, v4, v5), "paper-v3", "albert", "tfa", "optax", "keras", "apex", "nvlamb", "timm", "lambc",
            "deepspeed", "colossalai", "torch_optimizer", "torch_optimizer-debias" or "cybertronai".

    Raises:
        ValueError: an unknown name.

    Example:
        >>> from largebatch import LAMB
        >>> LAMB.dialect("deepspeed")["ratio_bounds"]
        (0.01, 10.0)
        >>> optimizer = LAMB([torch.nn.Parameter(torch.ones(3))], lr=2e-3, **LAMB.dialect("albert"))
    """
    check("dialect", name, name in DIALECTS, f"one of {', '.join(DIALECTS)}")
    return {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01, "bias_correction": True, **DIALECTS[name]}


def convert_state_dict(state_dict: Mapping[str, Any], source: str, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Translate the state dict of another implementation, for ``optimizer.load_state_dict``.

    The moments and the step count come over. So do the settings of Apex and timm, whose rule ours can take; those of
    torch's Adam and AdamW do not, since their learning rates mean something else: the optimizer's own stay.

    Args:
        state_dict: what the other optimizer's ``state_dict()`` returned.
        source: "apex" (FusedLAMB), "nvlamb" (FusedLAMB with use_nvlamb=True), "timm" (Lamb) or "torch" (Adam, AdamW).
        optimizer: a `LAMB` over the same parameters, in as many groups of the same sizes.

    Raises:
        ValueError: an unknown source, a setting of the source that LAMB has no equal of, or groups that do not match.

    Example:
        >>> from largebatch import LAMB
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> weight.grad = torch.ones(3)
        >>> adamw = torch.optim.AdamW([weight])
        >>> adamw.step()
        >>> lamb = LAMB([weight], lr=2e-3)
        >>> lamb.load_state_dict(convert_state_dict(adamw.state_dict(), "torch", lamb))
        >>> lamb.state[weight]["step"], lamb.param_groups[0]["lr"]
        (tensor(1.), 0.002)
    """
    check("source", source, source in ("apex", "nvlamb", "timm", "torch"), "'apex', 'nvlamb', 'timm' or 'torch'")
    own: list[dict[str, Any]] = optimizer.state_dict()["param_groups"]
    foreign: list[dict[str, Any]] = state_dict["param_groups"]
    sizes = [[len(group["params"]) for group in groups] for groups in (foreign, own)]
    check("state_dict", sizes[0], sizes[0] == sizes[1], f"groups of {sizes[1]} parameters, as the optimizer has")

    groups, state = [], {}
    for theirs, ours in zip(foreign, own, strict=True):
        groups.append({**ours, **(_settings(theirs, source) if source != "torch" else {})})
        for number, own_number in zip(theirs["params"], ours["params"], strict=True):
            if number in state_dict["state"]:
                values = state_dict["state"][number]
                step = values.get("step", theirs.get("step"))
                check("state_dict", sorted(map(str, theirs)), step is not None, "a step count in the groups")
                state[own_number] = {
                    "step": torch.as_tensor(step, dtype=torch.float32).reshape(()),
                    "exp_avg": values["exp_avg"],
                    "exp_avg_sq": values["exp_avg_sq"],
                }
    return {"state": state, "param_groups": groups}


def _settings(group: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the settings of LAMB that equal those of a group of Apex's or timm's."""
    is_theirs = {"grad_averaging", "bias_correction"} <= group.keys()
    check("state_dict", sorted(map(str, group)), is_theirs, f"groups of {source}'s, with grad_averaging")
    check("grad_averaging", group["grad_averaging"], bool(group["grad_averaging"]), "True: m averages the gradients")
    check("caution", group.get("caution"), not group.get("caution"), "False")
    corrected = group.get("corrected_weight_decay")
    check("corrected_weight_decay", corrected, not corrected, "False")
    if group.get("max_grad_norm"):
        warnings.warn(
            f"max_grad_norm={group['max_grad_norm']} is not part of LAMB here: clip with it before each step "
            "(torch.nn.utils.clip_grad_norm_)",
            stacklevel=3,
        )
    settings = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
    settings["bias_correction"] = bool(group["bias_correction"])
    settings["always_adapt"] = source == "nvlamb" or bool(group.get("always_adapt", False))
    settings["decoupled_weight_decay"] = bool(group.get("decoupled_decay", False))
    settings["ratio_bounds"] = (0.0, 1.0) if group.get("trust_clip") else None
    return settings
