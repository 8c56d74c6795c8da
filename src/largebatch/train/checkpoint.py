"""Checkpoints: written whole or not at all, and refused when they are another model's."""

import json
import os
import pickle
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from largebatch.errors import UserError
from largebatch.train.engine import Progress

FORMAT_VERSION = 1


def save(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, *, keep: int | None = 2
) -> Path:
    """Write weights, optimizer state and progress to `folder/step-NNNNNNNN`, and drop all but the newest `keep`.

    The checkpoint is written beside its place and renamed into it, so a run killed at any moment leaves either the
    whole checkpoint or none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{progress.step:08d}"
    partial = folder / f".partial-{target.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    torch.save(model.state_dict(), partial / "model.pt")
    torch.save(optimizer.state_dict(), partial / "optimizer.pt")
    sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    manifest = {"version": FORMAT_VERSION, "progress": asdict(progress), "files": sizes}
    (partial / "checkpoint.json").write_text(json.dumps(manifest, indent=1))
    for path in partial.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    if keep is not None:
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in `folder`, None if there is none."""
    found = checkpoints(folder)
    return found[-1] if found else None


def load(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Progress:
    """Fill `model` and `optimizer` from `checkpoint` and return its progress.

    Raises:
        UserError: the checkpoint is damaged, or does not fit the model or the optimizer; neither is changed then.
    """
    manifest = _manifest(checkpoint)
    weights = _load_file(checkpoint / "model.pt")
    _check_fits(checkpoint, weights, model)
    state = _load_file(checkpoint / "optimizer.pt") if optimizer is not None else None
    if optimizer is not None and state is not None:
        _check_groups(checkpoint, state, optimizer)
        optimizer.load_state_dict(state)
    model.load_state_dict(weights)
    return Progress(**manifest["progress"])


def load_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The model's weights alone, by name."""
    _manifest(checkpoint)
    return _load_file(checkpoint / "model.pt")


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


def _load_file(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} cannot be read ({reason}); delete {path.parent} to resume from the checkpoint before"
        ) from None


def _check_fits(checkpoint: Path, weights: dict[str, torch.Tensor], model: nn.Module) -> None:
    expected = model.state_dict()
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


def _check_groups(checkpoint: Path, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    there = [len(group["params"]) for group in state["param_groups"]]
    here = [len(group["params"]) for group in optimizer.param_groups]
    if there != here:
        raise UserError(
            f"{checkpoint} was written with another grouping of parameters ({there} here {here}); "
            "use the optimizer settings it was written with"
        )
