"""Weight files read, and their tensors' names of any era matched to ours."""

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from largebatch.errors import UserError

from .bert import BertModel

_SHARD_INDEX = "model.safetensors.index.json"
_ENCODER_PARTS = ("embeddings.", "encoder.", "pooler.")
# Buffers that older versions of transformers stored
_NOT_WEIGHTS = re.compile(r"embeddings\.(position_ids|token_type_ids)$")
_LEGACY_NAMES = {"gamma": "weight", "beta": "bias"}
_DECODER_BIAS, _HEAD_BIAS = "cls.predictions.decoder.bias", "cls.predictions.bias"


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the weights in a folder in transformers' format, or in a .safetensors or .bin file, onto the CPU.

    Raises:
        UserError: if there are none, or a file is damaged or cut short.
    """
    if path.is_file():
        return _read_file(path)
    names = ("model.safetensors", _SHARD_INDEX, "pytorch_model.bin")
    found = next((path / name for name in names if (path / name).is_file()), None)
    if found is None:
        raise UserError(f"{path}: no weights here; model.safetensors or pytorch_model.bin is needed")
    if found.name != _SHARD_INDEX:
        return _read_file(found)
    try:
        shards = sorted(set(json.loads(found.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{found}: not an index of weight files (no weight_map); fetch it again") from None
    weights = {}
    for shard in shards:
        if not (path / shard).is_file():
            raise UserError(f"{path / shard}: no such file, but {found.name} names it; fetch it too")
        weights.update(_read_file(path / shard))
    return weights


def _read_file(path: Path) -> dict[str, Tensor]:
    remedy = "it is damaged or cut short; copy it again"
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as safetensors ({error}); {remedy}") from None
    try:
        # weights_only: an unpickled file of anybody's could run their code
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path}: cannot be read as PyTorch weights ({reason}); {remedy}") from None
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise UserError(f"{path}: holds no state dict (names and tensors)")
    return weights


def match_names(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors under the model's own names, and the names of the model's that are not among them.

    Raises:
        UserError: if the encoder is not exactly the model's, or a shape differs.
    """
    bare = isinstance(model, BertModel)
    wanted = {name if not bare else f"bert.{name}": parameter for name, parameter in named_weights(model).items()}
    given = {_modern_name(name): tensor for name, tensor in weights.items() if not _NOT_WEIGHTS.search(name)}
    if _DECODER_BIAS in given:  # of the two names, the one that transformers computes with
        given[_HEAD_BIAS] = given[_DECODER_BIAS]
    if not any(name.startswith("bert.") for name in given):
        raise UserError(f"{source}: holds no BERT encoder (no tensor is named bert.* or encoder.*)")

    missing = [name for name in wanted if name not in given]
    lost = [name for name in missing if name.startswith("bert.") and not name.startswith("bert.pooler.")]
    if lost:
        raise UserError(f"{source}: {_some(lost)} missing; the weights do not fit the model's configuration")
    surplus = [name for name in given if name.startswith("bert.") and name not in wanted and "pooler." not in name]
    if surplus:
        raise UserError(f"{source}: {_some(surplus)} too many; the weights do not fit the model's configuration")
    for name, parameter in wanted.items():
        if name in given and given[name].shape != parameter.shape:
            raise UserError(
                f"{source}: {name} has the shape {tuple(given[name].shape)}, but the model's configuration asks for "
                f"{tuple(parameter.shape)}"
            )

    prefix = "bert." if bare else ""
    found = {name.removeprefix(prefix): given[name] for name in wanted if name in given}
    return found, [name.removeprefix(prefix) for name in missing]


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters under the names that they have without `torch.compile`.

    Of a tied tensor's names it is the one under which transformers stores it.
    """
    return {_uncompiled(name): parameter for name, parameter in model.named_parameters()}


def _uncompiled(name: str) -> str:
    return name.replace("_orig_mod.", "")


def _modern_name(name: str) -> str:
    name = _uncompiled(name).removeprefix("module.")
    stem, _, last = name.rpartition(".")
    if stem.endswith("LayerNorm"):
        name = f"{stem}.{_LEGACY_NAMES.get(last, last)}"
    return f"bert.{name}" if name.startswith(_ENCODER_PARTS) else name


def _some(names: list[str]) -> str:
    """One name, and how many there are beside it."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
