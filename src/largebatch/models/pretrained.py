"""Models in transformers' format: a folder with config.json, model.safetensors and the tokenizer's files."""

import dataclasses
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from largebatch.errors import UserError

from .config import BertConfig
from .weights import match_names, named_weights, read_weights

Model = TypeVar("Model", bound=nn.Module)

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def save_pretrained(
    model: nn.Module, directory: str | os.PathLike[str], tokenizer_files: Iterable[str | os.PathLike[str]] = ()
) -> None:
    """Write a model as transformers' ``from_pretrained`` loads it, and :func:`load_pretrained`.

    Everything is written beside the target first and moved when complete, so that no half-written file is left.
    Other files in an existing folder are kept. Tied tensors are stored once.

    Args:
        model: one of the BERT models of this package, or what `torch.compile`, `DistributedDataParallel` or
            `AveragedModel` made of it.
        directory: the folder to write; made where missing.
        tokenizer_files: files to copy into it: vocab.txt, tokenizer.json, tokenizer_config.json, ...

    Raises:
        UserError: if a tokenizer file is missing, or the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    model = unwrapped(model)
    directory = Path(directory)
    copies = [Path(file) for file in tokenizer_files]
    for file in copies:
        if not file.is_file():
            raise UserError(f"{file}: no such tokenizer file")
    weights = {name: parameter.detach().cpu().contiguous() for name, parameter in named_weights(model).items()}
    if "cls.predictions.bias" in weights and not model.config.tie_word_embeddings:
        # only where embeddings are tied does transformers know that this is the decoder's bias
        weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"].clone()
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    config = {"architectures": [type(model).__name__], **model.config.to_hf(), "dtype": dtype}
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as folder:
            partial = Path(folder)
            for file in copies:
                shutil.copyfile(file, partial / file.name)
            (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            save_file(weights, partial / WEIGHTS_FILE, metadata={"format": "pt"})  # transformers wants the format named
            shutil.copymode(partial / CONFIG_FILE, partial / WEIGHTS_FILE)  # safetensors lets the owner alone read it
            directory.mkdir(exist_ok=True)
            for name in [*(file.name for file in copies), WEIGHTS_FILE, CONFIG_FILE]:
                os.replace(partial / name, directory / name)
    except OSError as error:
        raise UserError(f"{error.filename or directory}: cannot be written ({error.strerror})") from None
    except SafetensorError as error:
        raise UserError(f"{directory}: the weights cannot be written ({error})") from None


def load_pretrained(
    cls: type[Model],
    directory: str | os.PathLike[str],
    *,
    unpad: bool = True,
    checkpoint_layers: bool = False,
    **changes: Any,
) -> Model:
    """Load a model that :func:`save_pretrained` or transformers wrote, or a BERT from the Hugging Face hub.

    Weights that the folder does not have keep their initial values, and one warning names them: a head that must be
    trained first. Weights of other heads are left out.

    Args:
        cls: the class to make, whatever was saved.
        directory: a folder with config.json and model.safetensors (in shards or not) or pytorch_model.bin.
        unpad, checkpoint_layers: as for :class:`BertModel`.
        changes: fields of the config to set otherwise, as ``hidden_dropout_prob=0.0``.

    Returns:
        The model, in training mode as a new one is, in fp32.

    Raises:
        UserError: if a file is missing or damaged, is no BERT's, or config and weights do not fit each other.

    Example:
        >>> model = load_pretrained(BertForQuestionAnswering, "runs/export")  # doctest: +SKIP
    """
    config = read_config(directory)
    unknown = sorted(set(changes) - {field.name for field in dataclasses.fields(config)})
    if unknown:
        raise UserError(f"BERT config: no field is called {unknown[0]!r}")
    config = dataclasses.replace(config, **changes)
    model = cls(config, unpad=unpad, checkpoint_layers=checkpoint_layers)  # type: ignore[call-arg]
    fresh = load_weights(model, directory)
    if fresh:
        warnings.warn(
            f"{directory} has no {', '.join(fresh)}: {cls.__name__} starts with these at random; train it first",
            stacklevel=2,
        )
    return model


def load_weights(
    model: nn.Module, weights: Mapping[str, Tensor] | str | os.PathLike[str], source: str | None = None
) -> list[str]:
    """Fill a BERT of this package with weights from a folder or a state dict; return the names that were not in it.

    Names may be transformers' of any era: with or without ``bert.`` in front, LayerNorms with gamma and beta.

    Args:
        model: the model to fill, in place, in its own dtype and device; wrapped or not, as for :func:`save_pretrained`.
        weights: a folder as for :func:`load_pretrained`, a weights file, or a state dict.
        source: where a state dict came from, for messages.

    Returns:
        The model's weights that were not found and keep their values: heads only.

    Raises:
        UserError: if a file is missing or damaged, weights of the encoder are missing or too many, or shapes differ.
            The model is then as it was.
    """
    if not isinstance(weights, Mapping):
        source = source or str(weights)
        weights = read_weights(Path(weights))
    model = unwrapped(model)
    found, fresh = match_names(model, weights, source or "the weights")
    own = named_weights(model)
    with torch.no_grad():
        for name, tensor in found.items():
            own[name].copy_(tensor)
    return fresh


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model within what `torch.compile`, `DistributedDataParallel` or `AveragedModel` made of it."""
    while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        model = inner
    return model


def read_config(directory: str | os.PathLike[str]) -> BertConfig:
    """Read the config.json in a folder.

    Raises:
        UserError: if there is none, it is no JSON, or it does not describe a BERT encoder.
    """
    path = Path(directory) / CONFIG_FILE
    if not Path(directory).is_dir():
        raise UserError(f"{directory}: no such folder; a folder with {CONFIG_FILE} and {WEIGHTS_FILE} is needed")
    if not path.is_file():
        raise UserError(f"{path}: no such file; the model's configuration is needed")
    try:
        fields = json.loads(path.read_bytes())
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; it must hold a JSON object") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: holds no JSON object; it is not a model's configuration")
    return BertConfig.from_hf(fields, str(path))
