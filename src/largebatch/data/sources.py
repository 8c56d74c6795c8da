"""What the inputs name: files of known kinds, directories of them, Hugging Face data sets."""

import bz2
import gzip
import lzma
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import IO, NoReturn

from largebatch.errors import UserError

from .manifest import MANIFEST_NAME

OPENERS: dict[str, Callable[[IO[bytes]], IO[bytes]]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}  # type: ignore[dict-item]
_KINDS = {
    ".txt": "text",
    ".text": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
_SPLIT_NAMES = {"train", "validation", "valid", "dev", "test"}


@dataclass(frozen=True)
class Source:
    """One input: a file, or a Hugging Face data set (then `path` is None)."""

    kind: str
    name: str
    path: Path | None
    dataset: tuple[str, str | None, str | None] | None = None  # name, configuration, split
    may_be_empty: bool = False


def find_sources(inputs: str | Path | Sequence[str | Path]) -> list[Source]:
    """The files and data sets that the inputs name, directories expanded and sorted.

    Links are followed, each directory is read once, and what `prepare` makes is left out: a corpus is not text.

    Args:
        inputs: one or several of them.

    Raises:
        UserError: an input is missing, is empty, cannot be read, holds no file of a known kind, or is of no known kind.
    """
    if isinstance(inputs, str | Path):
        inputs = [inputs]
    if not inputs:
        raise UserError("no input given; name a text, JSONL or Parquet file, a directory of them, or hf:NAME")
    sources: list[Source] = []
    for given in inputs:
        if str(given).startswith("hf:"):
            sources.append(_dataset_source(str(given)))
            continue
        path = Path(given)
        found = _checked(path)
        if not S_ISDIR(found.st_mode):
            if not found.st_size:
                raise UserError(f"{path}: the file is empty; remove it from the inputs")
            sources.append(Source(_kind_of(path) or "text", path.name, path))
            continue
        if _is_made(path):
            raise UserError(f"{path}: made by `largebatch prepare`, not text; name what it was made of")
        files = [file for file in _files_below(path) if _kind_of(file) and _checked(file)]
        if not files:
            raise UserError(f"{path}: no {', '.join(_KINDS)} file (plain or .gz, .xz, .bz2) in this directory")
        sources += [
            Source(
                _kind_of(file) or "text", f"{path.name}/{file.relative_to(path).as_posix()}", file, may_be_empty=True
            )
            for file in sorted(files, key=lambda file: file.relative_to(path).parts)
        ]
    return sources


def _checked(path: Path) -> os.stat_result:
    """What the system says of a file or directory that can be looked at.

    Raises:
        UserError: it is neither, is missing, or is out of reach.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        what = "a link to a file that is not there" if path.is_symlink() else "there is no such file or directory"
        raise UserError(f"{path}: {what}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not (S_ISDIR(found.st_mode) or S_ISREG(found.st_mode)):
        raise UserError(f"{path}: a pipe or a device, and the input is read more than once; name a file")
    return found


def _files_below(directory: Path) -> list[Path]:
    """All files below a directory but hidden ones and those that `prepare` made.

    Each directory is read once, under its own name rather than a link's; a link upwards is not followed.
    """
    files: list[Path] = []
    seen = set(directory.resolve().parents)
    starts = [directory]
    for start in starts:  # which links met on the way make longer
        for folder, folders, names in os.walk(start, onerror=_refuse):
            here = Path(folder)
            if (real := here.resolve()) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if name[0] != "." and not _is_made(here / name))
            starts += [here / name for name in folders if (here / name).is_symlink()]
            files += [here / name for name in names if name[0] != "."]
    return files


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename}: cannot be read: {error.strerror}; change that or move it out of the input")


def _is_made(directory: Path) -> bool:
    """Is this a corpus or one in the making?"""
    if directory.name.endswith(".partial"):
        signs = ("lock", "blocks-*", "vocab-*.txt")
        return any(any(directory.glob(sign)) for sign in signs)  # False, not an error, where it cannot be read
    return all(os.path.isfile(directory / sign) for sign in (MANIFEST_NAME, "train/document_offsets.npy"))


def _kind_of(path: Path) -> str | None:
    name = path.name.lower()
    suffixes = Path(name).suffixes
    if suffixes and suffixes[-1] == ".zst":
        raise UserError(f"{path}: zstandard is not read; decompress it with `unzstd` first")
    if suffixes and suffixes[-1] in OPENERS:
        kind = _KINDS.get(suffixes[-2]) if len(suffixes) > 1 else None
        if kind == "parquet":
            raise UserError(f"{path}: Parquet is compressed inside; decompress the file first")
        return kind
    return _KINDS.get(suffixes[-1]) if suffixes else None


def _dataset_source(given: str) -> Source:
    name, *rest = re.split(r":(?![^\[]*\])", given.removeprefix("hf:"))
    if not name or len(rest) > 2:
        raise UserError(f"{given}: a Hugging Face data set is named hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    if len(rest) < 2:  # one name: a split if it looks like one, else a configuration
        rest = ["", *rest] if rest and re.split(r"[\[+]", rest[0])[0] in _SPLIT_NAMES else [*rest, "", ""]
    return Source("dataset", given, None, (name, rest[0] or None, rest[1] or None))
