"""From an `OptimConfig` to an optimizer over a model's parameters."""

import dataclasses
from typing import Any

import torch
from torch import nn

import largebatch
from largebatch.errors import UserError
from largebatch.experiments.config import OptimConfig
from largebatch.optim import CPUOffload

# The settings that each optimizer reads, besides lr, weight_decay and exclude.
_READS = {
    "lamb": ("betas", "eps", "bias_correction", "norm", "backend"),
    "nlamb": ("betas", "eps", "bias_correction", "norm", "backend"),
    "nnlamb": ("betas", "eps", "bias_correction", "norm", "backend"),
    "lars": ("momentum", "trust_coefficient", "norm", "backend"),
    "adamw": ("betas", "eps"),
    "sgd": ("momentum",),
}


def build_optimizer(config: OptimConfig, model: nn.Module, cpu_offload: bool = False) -> torch.optim.Optimizer:
    """The optimizer over `model`, its parameters grouped by `exclude`; its state on the CPU, if so asked.

    Excluded parameters get no weight decay and no trust ratio.

    Raises:
        UserError: an unknown optimizer, a setting that it does not read, or a value that it refuses.
    """
    if config.name not in _READS:
        raise UserError(f"optim.name={config.name} is not known; known are {', '.join(_READS)}")
    _refuse_idle_settings(config)
    try:
        optimizer = _build(config, model)
        return CPUOffload(optimizer) if cpu_offload else optimizer
    except ValueError as error:
        raise UserError(f"optimizer {config.name}: {error}") from None


def _build(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    arguments: dict[str, Any] = {name: getattr(config, name) for name in _READS[config.name]}
    groups = largebatch.param_groups(model, config.weight_decay, exclude=config.exclude)
    if config.name in ("adamw", "sgd"):
        plain = [{"params": _tensors(group["params"]), "weight_decay": group["weight_decay"]} for group in groups]
        kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.SGD
        return kind(plain, lr=config.lr, **arguments)
    kind = getattr(largebatch, config.name.upper())
    return kind(groups, lr=config.lr, weight_decay=config.weight_decay, **arguments)


def _tensors(parameters: Any) -> list[torch.Tensor]:
    return [parameter[1] if isinstance(parameter, tuple) else parameter for parameter in parameters]


def _refuse_idle_settings(config: OptimConfig) -> None:
    read = {"name", "lr", "weight_decay", "exclude", *_READS[config.name]}
    for setting in dataclasses.fields(OptimConfig):
        if setting.name not in read and getattr(config, setting.name) != setting.default:
            raise UserError(
                f"optim.{setting.name} has no effect on {config.name}, which reads {', '.join(sorted(read))}"
            )
