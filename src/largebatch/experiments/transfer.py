"""Models out of runs and into them: export to Hugging Face's format, and encoders to fine-tune from either."""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import BertWordPieceTokenizer, Tokenizer
from torch import nn

from largebatch.data import Vocabulary
from largebatch.errors import UserError
from largebatch.experiments.runner import config_of
from largebatch.models import (
    BertConfig,
    BertForPreTraining,
    BertForQuestionAnswering,
    load_weights,
    save_pretrained,
)
from largebatch.train import checkpoint
from largebatch.train.metrics import read_json

# A run's own copy of its tokenizer, so that it needs the corpus no more.
TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True)
class Encoder:
    """A BERT to start from, wherever it came from."""

    config: BertConfig
    folder: Path
    is_run: bool

    @property
    def tokenizer_files(self) -> list[Path]:
        """The files that make up its tokenizer, those of them that there are."""
        folder = self.folder / TOKENIZER_FOLDER if self.is_run else self.folder
        names = ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
        found = [folder / name for name in names if (folder / name).is_file()]
        if not any(path.name in ("vocab.txt", "tokenizer.json") for path in found):
            raise UserError(f"{folder} has no tokenizer; put the model's vocab.txt or tokenizer.json there")
        return found

    def tokenizer(self) -> Tokenizer:
        return _read_tokenizer(self.tokenizer_files)

    def load_into(self, model: nn.Module) -> list[str]:
        """Fill `model` with the weights; return the names of those that the encoder does not have."""
        if self.is_run:
            return load_weights(model, run_weights(self.folder), source=str(self.folder))
        return load_weights(model, self.folder)


def open_encoder(path: Path) -> Encoder:
    """The encoder in a run directory, or in a folder in Hugging Face's format.

    Raises:
        UserError: it is neither, or its tokenizer is missing.
    """
    content = read_json(path / "config.json")
    if "kind" not in content:
        return Encoder(BertConfig.from_hf(content), path, is_run=False)
    if "bert" not in content.get("details", {}):
        raise UserError(f"{path} is a run of kind {content['kind']}; name a run of BERT")
    return Encoder(BertConfig.from_hf(content["details"]["bert"]), path, is_run=True)


def run_weights(run: Path) -> dict[str, torch.Tensor]:
    """The weights of a run's newest checkpoint.

    Raises:
        UserError: it has none yet, or it is damaged.
    """
    found = checkpoint.latest(run / "checkpoints")
    if found is None:
        raise UserError(f"{run} has no checkpoint yet; let the run go on with --resume")
    return checkpoint.load_weights(found)


def export_to_hf(run: Path, out: Path) -> None:
    """Write the newest checkpoint of a BERT run as `transformers` loads it.

    Raises:
        UserError: the run is not of BERT, or has no checkpoint yet, or `out` is a run directory.
    """
    if (out / "config.json").exists() and "kind" in read_json(out / "config.json"):
        raise UserError(f"{out} is a run, whose config.json would be lost; name another folder with --out")
    encoder = open_encoder(run)
    kinds = {"pretraining": BertForPreTraining, "squad": BertForQuestionAnswering}
    if not encoder.is_run:
        raise UserError(f"{run} is in Hugging Face's format already")
    model = kinds[config_of(run).kind](encoder.config)
    model.load_state_dict(run_weights(run))
    save_pretrained(model, out, encoder.tokenizer_files)


def copy_tokenizer(files: Iterable[Path], run: Path) -> None:
    """Give a run its own copy of its tokenizer's files."""
    folder = run / TOKENIZER_FOLDER
    folder.mkdir(exist_ok=True)
    for path in files:
        shutil.copyfile(path, folder / path.name)


def _read_tokenizer(files: Sequence[Path]) -> Tokenizer:
    """`tokenizer.json`, or BERT's usual tokenizer over a `vocab.txt` that lies alone, as with older models."""
    by_name = {path.name: path for path in files}
    if "tokenizer.json" in by_name:
        try:
            return Tokenizer.from_file(str(by_name["tokenizer.json"]))
        except Exception as error:  # tokenizers raises nothing more definite
            raise UserError(f"{by_name['tokenizer.json']} cannot be read ({error}); copy it again") from None
    settings = read_json(by_name["tokenizer_config.json"]) if "tokenizer_config.json" in by_name else {}
    tokens = Vocabulary.read(by_name["vocab.txt"]).tokens
    ids = {token: index for index, token in enumerate(tokens)}
    return BertWordPieceTokenizer(
        ids,
        lowercase=settings.get("do_lower_case", True),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )._tokenizer
