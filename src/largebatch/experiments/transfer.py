"""Models out of runs and into them: export to Hugging Face's format, and encoders to fine-tune from either."""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, BertWordPieceTokenizer, Tokenizer
from tokenizers.normalizers import BertNormalizer
from torch import nn

from largebatch.data.vocabulary import SPECIAL_TOKENS
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

# The values of `tokenizer_class`, with "Fast" at the end or without, whose vocab.txt holds BERT's word pieces.
WORD_PIECE_CLASSES = (
    *("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MobileBertTokenizer"),
    *("PreTrainedTokenizer", "TokenizersBackend"),  # of any model's
)
# What a `tokenizer_config.json` calls the settings of a `BertNormalizer`.
NORMALIZER_SETTINGS = {
    "lowercase": "do_lower_case",
    "strip_accents": "strip_accents",
    "handle_chinese_chars": "tokenize_chinese_chars",
}


@dataclass(frozen=True)
class Encoder:
    """A BERT to start from, wherever it came from."""

    config: BertConfig
    folder: Path
    is_run: bool
    tokenizer_class: str | None = None

    @property
    def tokenizer_files(self) -> list[Path]:
        """The files that make up its tokenizer, those of them that there are."""
        folder = self.folder / TOKENIZER_FOLDER if self.is_run else self.folder
        names = ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
        found = [folder / name for name in names if (folder / name).is_file()]
        if not any(path.name in ("vocab.txt", "tokenizer.json") for path in found):
            raise UserError(f"{folder} has no tokenizer; put the model's vocab.txt or tokenizer.json there")
        return found

    def tokenizer(self) -> Tokenizer:
        return _read_tokenizer(self.tokenizer_files, self.tokenizer_class)

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
        config = BertConfig.from_hf(content, str(path / "config.json"))
        return Encoder(config, path, is_run=False, tokenizer_class=content.get("tokenizer_class"))
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


def _read_tokenizer(files: Sequence[Path], tokenizer_class: str | None) -> Tokenizer:
    """`tokenizer.json`, or BERT's usual tokenizer over a `vocab.txt` that lies alone; settings beside it win.

    The class is what the model's configuration names, where the tokenizer's names none.
    """
    by_name = {path.name: path for path in files}
    settings = read_json(by_name["tokenizer_config.json"]) if "tokenizer_config.json" in by_name else {}
    normalization = {name: settings[key] for name, key in NORMALIZER_SETTINGS.items() if key in settings}
    if "tokenizer.json" in by_name:
        return _normalized(_read_whole(by_name["tokenizer.json"]), normalization)
    path = by_name["vocab.txt"]
    tokenizer_class = settings.get("tokenizer_class") or tokenizer_class
    if tokenizer_class and tokenizer_class.removesuffix("Fast") not in WORD_PIECE_CLASSES:
        raise UserError(f"{path} is of a {tokenizer_class}, not of BERT's; save the tokenizer as tokenizer.json there")
    tokenizer = BertWordPieceTokenizer(_read_pieces(path), **normalization)._tokenizer
    added = _added_tokens(settings, by_name.get("added_tokens.json"))
    tokenizer.add_tokens([token for _, token in sorted(added.items())])
    for number, token in added.items():
        if tokenizer.token_to_id(token.content) != number:
            raise UserError(
                f"{path}: the added token {token.content!r} has the number {number}, which does not follow on the "
                "file's lines; save the tokenizer as tokenizer.json there"
            )
    return tokenizer


def _read_whole(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more definite
        raise UserError(f"{path} cannot be read ({error}); copy it again") from None


def _normalized(tokenizer: Tokenizer, normalization: Mapping[str, Any]) -> Tokenizer:
    normalizer = tokenizer.normalizer
    if isinstance(normalizer, BertNormalizer):
        for name, value in normalization.items():
            setattr(normalizer, name, value)
        tokenizer.normalizer = normalizer  # added tokens are normalised when it is set
    return tokenizer


def _read_pieces(path: Path) -> dict[str, int]:
    """The ids of a model's word pieces: numbers of lines, of one that is there twice the last, as for transformers."""
    try:
        lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; copy it again") from None
    pieces = {piece: number for number, piece in enumerate(lines)}
    missing = [token for token in SPECIAL_TOKENS if token not in pieces]
    if missing:
        raise UserError(f"{path}: lacks {' '.join(missing)}; put the vocab.txt of a BERT there")
    return pieces


def _added_tokens(settings: Mapping[str, Any], file: Path | None) -> dict[int, AddedToken]:
    """The tokens that a model has beyond its vocab.txt, in either of the two ways to say so."""
    if "added_tokens_decoder" in settings:
        return {int(number): AddedToken(**token) for number, token in settings["added_tokens_decoder"].items()}
    return {number: AddedToken(token) for token, number in read_json(file).items()} if file is not None else {}
