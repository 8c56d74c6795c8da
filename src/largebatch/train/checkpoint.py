"""Checkpoints: written whole or not at all, refused when they are another model's, and read on any ranks and shards."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from largebatch.errors import UserError
from largebatch.train import distributed
from largebatch.train.engine import Progress

FORMAT_VERSION = 2


def save(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, *, keep: int | None = 2
) -> Path:
    """Write weights, optimizer state and progress to `folder/step-NNNNNNNN`, and drop all but the newest `keep`.

    All ranks of the run call it, and each writes what it holds. The checkpoint is written beside its place and renamed
    into it, so a run killed at any moment leaves either the whole checkpoint or none.

    Raises:
        ValueError: `keep` is neither None, for all, nor at least 1.
        UserError: the optimizer keeps something that no checkpoint can hold, or the disk is full or cannot be written;
            the checkpoints before are left as they are then.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep={keep}: expected at least 1, or None to keep all checkpoints")
    target = folder / f"step-{progress.step:08d}"
    partial = folder / f".partial-{target.name}"
    if distributed.is_chief():
        for left in folder.glob(".partial-step-*"):  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
    distributed.barrier()
    tensors = {f"model.{name}": x for name, x in _tensors_of(model)}
    numbers: dict[str, dict[str, Any]] = {}
    for name, _, state in _states(model, optimizer):
        tensors |= {f"optimizer.{name}.{key}": x for key, x in state.items() if isinstance(x, Tensor)}
        numbers[name] = {key: x for key, x in state.items() if not isinstance(x, Tensor) and x is not None}
        for key, x in numbers[name].items():
            if not isinstance(x, int | float):
                raise UserError(f"no checkpoint can hold the optimizer's {key!r} of {name}, {type(x).__name__}")
    try:
        distributed.write_tensors(tensors, partial)
        if distributed.is_chief():
            manifest = {
                "version": FORMAT_VERSION,
                "progress": asdict(progress),
                "tied": _tied(model),
                "optimizer": {"numbers": numbers, "groups": [_counters(optimizer, g) for g in optimizer.param_groups]},
                "files": {path.name: path.stat().st_size for path in sorted(partial.iterdir())},
            }
            (partial / "checkpoint.json").write_text(json.dumps(manifest, indent=1))
    except OSError as error:
        if distributed.is_chief():
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"{target} cannot be written ({error.strerror or error}); make room, and go on with --resume"
        ) from None
    if distributed.is_chief():
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        if keep is not None:
            for old in checkpoints(folder)[:-keep]:
                shutil.rmtree(old)
    distributed.barrier()
    return target


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in `folder`, None if there is none."""
    found = checkpoints(folder)
    return found[-1] if found else None


def load(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Progress:
    """Fill `model` and `optimizer` from `checkpoint` and return its progress; all ranks of the run call it.

    Raises:
        UserError: the checkpoint is damaged, or does not fit the model or the optimizer; neither is changed then.
    """
    manifest = _manifest(checkpoint)
    stored = _stored(checkpoint)
    weights = dict(_tensors_of(model))
    _check_fits(
        checkpoint, {name.removeprefix("model."): x for name, x in stored.items() if name[:6] == "model."}, weights
    )
    read = {f"model.{name}": torch.empty_like(x) for name, x in weights.items()}
    keys: dict[str, list[str]] = {}
    if optimizer is not None:
        for name, parameter, _ in _states(model, optimizer):
            prefix = f"optimizer.{name}."
            keys[name] = [full.removeprefix(prefix) for full in stored if full.startswith(prefix)]
            for key in keys[name]:
                kept = stored[prefix + key]
                # On the CPU, from where the optimizer copies it to where its state lives; shards stay with their mesh.
                shard = kept.shape == parameter.shape and hasattr(parameter, "placements")
                made = torch.empty_like(parameter, dtype=kept.dtype) if shard else torch.empty_like(kept, device="cpu")
                read[prefix + key] = made
    _read(checkpoint, read)
    if optimizer is not None:
        state_dict = optimizer.state_dict()
        kept = manifest.get("optimizer", {"numbers": {}, "groups": []})  # older ones lack it
        places = {id(x): n for n, x in enumerate(_params(optimizer))}
        state_dict["state"] = {}
        for name, parameter, _ in _states(model, optimizer):
            tensors = {key: read[f"optimizer.{name}.{key}"] for key in keys[name]}
            if state := tensors | kept["numbers"].get(name, {}):
                state_dict["state"][places[id(parameter)]] = state
        for group, counters in zip(state_dict["param_groups"], kept["groups"], strict=False):
            group.update(counters)
        try:
            optimizer.load_state_dict(state_dict)
        except ValueError as error:
            raise UserError(f"{checkpoint} does not fit the optimizer: {error}") from None
    with torch.no_grad():
        for name, x in weights.items():
            x.copy_(read[f"model.{name}"])
    return Progress(**manifest["progress"])


def load_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The model's weights alone, whole, by every name they have in its state dict."""
    manifest = _manifest(checkpoint)
    stored = {name: x for name, x in _stored(checkpoint).items() if name.startswith("model.")}
    read = {name: torch.empty_like(x, device="cpu") for name, x in stored.items()}
    _read(checkpoint, read, alone=True)
    weights = {name.removeprefix("model."): x for name, x in read.items()}
    return weights | {name: weights[first] for name, first in manifest["tied"].items()}


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the model's state dict, each under the first of its names only."""
    kept = model.state_dict(keep_vars=True)
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if name in kept:
            yield name, x.detach()


def _tied(model: nn.Module) -> dict[str, str]:
    """The further names of tied parameters, with the first."""
    first = {id(x): name for name, x in model.named_parameters()}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first[id(x)] for name, x in named if first[id(x)] != name}


def _states(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter, dict[str, Any]]]:
    """Name, parameter and state of all that the optimizer moves."""
    names = {id(x): name for name, x in model.named_parameters()}
    for x in _params(optimizer):
        yield names[id(x)], x, optimizer.state.get(x, {})


def _counters(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    """The numbers that an optimizer keeps in a group beside its settings, as some do their step count."""
    settings = {"lr_scale", "initial_lr", *optimizer.defaults}
    return {key: x for key, x in group.items() if isinstance(x, int | float) and key not in settings}


def _params(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [x for group in optimizer.param_groups for x in group["params"]]


def _manifest(checkpoint: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((checkpoint / "checkpoint.json").read_text())
        version, sizes = manifest["version"], manifest["files"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{checkpoint} is no checkpoint of largebatch ({type(error).__name__}: {error}); "
            "name a folder checkpoints/step-* of a run"
        ) from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{checkpoint} has checkpoint format {version}, this version of largebatch reads {FORMAT_VERSION}"
        )
    for name, size in sizes.items():
        path = checkpoint / name
        found = path.stat().st_size if path.exists() else 0
        if found != size:
            raise UserError(
                f"{path} is damaged: {found} bytes of {size}; delete {checkpoint} to resume from the one before"
            )
    return manifest  # type: ignore[no-any-return]


def _stored(checkpoint: Path) -> dict[str, Tensor]:
    try:
        return distributed.stored_tensors(checkpoint)
    except Exception as error:  # a damaged pickle raises what it likes
        raise _unreadable(checkpoint, error) from None


def _read(checkpoint: Path, tensors: dict[str, Tensor], *, alone: bool = False) -> None:
    try:
        distributed.read_tensors(tensors, checkpoint, alone=alone)
    except OSError as error:
        raise _unreadable(checkpoint, error) from None


def _unreadable(checkpoint: Path, error: Exception) -> UserError:
    return UserError(f"{checkpoint} cannot be read ({error}); delete it to resume from the checkpoint before")


def _check_fits(checkpoint: Path, weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights or name not in expected:
            lacking = "the checkpoint" if name not in weights else "the model"
            raise UserError(
                f"{checkpoint} is of another model: {lacking} has no {name}; use the configuration it was written with"
            )
        if weights[name].shape != expected[name].shape:
            raise UserError(
                f"{checkpoint} is of another model: {name} is {list(weights[name].shape)} there and "
                f"{list(expected[name].shape)} here; use the configuration it was written with"
            )
