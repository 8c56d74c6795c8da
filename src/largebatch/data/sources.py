"""What the inputs name: files of known kinds, directories of them, Hugging Face data sets."""

import bz2
import gzip
import lzma
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from largebatch.errors import UserError

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
    dataset: tuple[str, str | None, str] | None = None
    may_be_empty: bool = False


def find_sources(inputs: str | Path | Sequence[str | Path], skip: Sequence[Path] = ()) -> list[Source]:
    """The files and data sets that the inputs name, directories expanded and sorted.

    Args:
        inputs: one or several of them.
        skip: directories that are left out where one of them lies inside an input: what is made is not read.

    Raises:
        UserError: an input is missing, is empty, holds no file of a known kind, or is of no known kind.
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
        if not path.exists():
            raise UserError(f"{path}: there is no such file or directory")
        if not path.is_dir():
            if not path.stat().st_size:
                raise UserError(f"{path}: the file is empty; remove it from the inputs")
            sources.append(Source(_kind_of(path) or "text", path.name, path))
            continue
        files = sorted(
            (file for file in path.rglob("*") if file.is_file() and _kind_of(file)),
            key=lambda file: file.relative_to(path).parts,
        )
        files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        skipped = _inside(path, skip)
        files = [file for file in files if skipped.isdisjoint(file.parents)]
        if not files:
            raise UserError(f"{path}: no {', '.join(_KINDS)} file (plain or .gz, .xz, .bz2) in this directory")
        sources += [
            Source(
                _kind_of(file) or "text", f"{path.name}/{file.relative_to(path).as_posix()}", file, may_be_empty=True
            )
            for file in files
        ]
    return sources


def _inside(directory: Path, paths: Sequence[Path]) -> set[Path]:
    """Those of the paths that lie inside the directory, spelled as its own files are."""
    root = directory.resolve()
    resolved = (path.resolve() for path in paths)
    return {directory / path.relative_to(root) for path in resolved if root in path.parents}


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
    name, *rest = given.removeprefix("hf:").split(":")
    if not name or len(rest) > 2:
        raise UserError(f"{given}: a Hugging Face data set is named hf:NAME, hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    config: str | None = None
    split = "train"
    if len(rest) == 2:
        config, split = rest[0] or None, rest[1] or "train"
    elif rest:  # one name: a split if it looks like one, else a configuration
        if re.split(r"[\[+]", rest[0])[0] in _SPLIT_NAMES:
            split = rest[0]
        else:
            config = rest[0] or None
    return Source("dataset", given, None, (name, config, split))
