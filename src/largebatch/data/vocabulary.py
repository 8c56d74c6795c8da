"""A WordPiece vocabulary as the training instances need it."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from largebatch.errors import UserError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class Vocabulary:
    """Word pieces in the order of their ids.

    Args:
        tokens: one string per id; a piece that continues a word starts with "##".
    """

    tokens: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """The ids of [PAD], [UNK], [CLS], [SEP] and [MASK]."""
        return {token: self.tokens.index(token) for token in SPECIAL_TOKENS}

    @cached_property
    def continues_word(self) -> NDArray[np.bool_]:
        """bool [len(self)]: the pieces that start with "##"."""
        return np.array([token.startswith("##") for token in self.tokens], dtype=bool)

    @classmethod
    def read(cls, path: str | Path, *, lowercase: bool | None = None) -> "Vocabulary":
        """Read a vocab.txt, one piece per line.

        Args:
            path: the file, or a directory that holds it.
            lowercase: whether its text will be lower-cased, for a tokenizer_config.json beside it to agree with.

        Raises:
            UserError: no such file, not UTF-8, an empty or repeated line, a special token missing, or a vocabulary of
                the other case.
        """
        path = Path(path)
        try:
            if path.is_dir():
                path = path / "vocab.txt"
            if not path.is_file():
                raise UserError(f"{path}: there is no such vocabulary file")
            text = path.read_bytes().decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 at byte {error.start}; a vocabulary is UTF-8 text") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        if lowercase is not None:
            _check_case(path.with_name("tokenizer_config.json"), lowercase)
        tokens = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
        seen: dict[str, int] = {}
        for number, token in enumerate(tokens, 1):
            if not token:  # blanks are no error: bert-base-chinese has U+2028
                raise UserError(f"{path}, line {number}: empty; a vocabulary holds one word piece per line")
            if token in seen:
                raise UserError(f"{path}, line {number}: {token!r} repeats line {seen[token]}; remove one of them")
            seen[token] = number
        missing = [token for token in SPECIAL_TOKENS if token not in seen]
        if missing:
            raise UserError(f"{path}: lacks {' '.join(missing)}; add each as a line of its own, or train a vocabulary")
        return cls(tuple(tokens))


def _check_case(path: Path, lowercase: bool) -> None:
    try:
        made_so = json.loads(path.read_bytes()).get("do_lower_case")
    except (OSError, ValueError, AttributeError):  # none, or none of a tokenizer
        return
    if isinstance(made_so, bool) and made_so != lowercase:
        what = "uncased; leave out --cased" if made_so else "cased; give --cased"
        raise UserError(f"{path}: the vocabulary is {what} (in Python, lowercase={made_so})")
