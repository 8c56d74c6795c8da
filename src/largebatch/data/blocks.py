"""Reading inputs of any supported kind as a sequence of blocks that depends on the inputs alone.

A block is the unit of parallel work and of resuming. The reader cuts files where documents end and leaves decoding,
splitting and tokenising to whoever gets the block, so one reader feeds many workers.
"""

import gzip
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from largebatch.errors import UserError

from .manifest import file_checksum
from .sources import OPENERS, Source

BLOCK_BYTES = 4 << 20
# A longer document is cut into several, so that memory stays bounded.
MAX_DOCUMENT_BYTES = 32 << 20
_ROWS = 512
_BLANK_LINE = re.compile(rb"\n[ \t\r\f\v]*\n")

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Piece:
    """Consecutive whole documents of one source: undecoded bytes of a file, or the rows of a table.

    `name` is the source's, which a block's name depends on; `where` is the path as given, for messages.
    """

    kind: str
    name: str
    where: str
    content: bytes | list[Any]
    first_line: int
    first_byte: int
    cut: bool = False  # the last document goes on in the next piece: it is longer than MAX_DOCUMENT_BYTES
    continued: bool = False  # the first document began in the piece before

    def crc32(self, crc: int) -> int:
        crc = zlib.crc32(f"{self.kind} {self.name} {self.first_line}\n".encode("utf-8", "surrogateescape"), crc)
        if isinstance(self.content, bytes):
            return zlib.crc32(self.content, crc)
        for row in self.content:
            crc = zlib.crc32(repr(row).encode("utf-8", "surrogatepass") + b"\n", crc)
        return crc


Block = list[Piece]


def read_blocks(
    sources: Sequence[Source], text_field: str, advance: Progress = lambda num_bytes: None
) -> Iterator[Block]:
    """All inputs as blocks of about `BLOCK_BYTES`, small files together; the cuts depend on nothing but the inputs.

    A piece of a file ends with a document, so it is a little smaller than a block and yet one of its own: a block is
    full from half its size on.

    Args:
        advance: told how many bytes more of the input files have been read.
    """
    block: Block = []
    size = 0
    for source in sources:
        for piece, piece_bytes in _read_pieces(source, text_field, advance):
            block.append(piece)
            size += piece_bytes
            if size >= BLOCK_BYTES // 2:
                yield block
                block, size = [], 0
    if block:
        yield block


def _read_pieces(source: Source, text_field: str, advance: Progress) -> Iterator[tuple[Piece, int]]:
    if source.kind == "parquet":
        rows = _parquet_rows(source, text_field, advance)
    elif source.kind == "dataset":
        rows = _dataset_rows(source, text_field)
    else:
        for piece in _file_pieces(source, advance):
            assert isinstance(piece.content, bytes)
            yield piece, len(piece.content)
        return
    where = str(source.path or source.name)
    first, texts, size = 1, [], 0
    try:
        for text in rows:
            texts.append(text)
            size += len(text) if isinstance(text, str) else 1
            if size >= BLOCK_BYTES:
                yield Piece("rows", source.name, where, texts, first, 0), size
                first, texts, size = first + len(texts), [], 0
    except UnicodeDecodeError as error:
        row = first + len(texts)
        raise UserError(
            f"{where}, rows {row} to {row + _ROWS - 1}: column {text_field!r} holds what is not UTF-8 "
            f"(0x{error.object[error.start]:02x}); write the table again with its text in UTF-8"
        ) from None
    if texts:
        yield Piece("rows", source.name, where, texts, first, 0), size


def _file_pieces(source: Source, advance: Progress) -> Iterator[Piece]:
    line, offset, carry, continued = 1, 0, b"", False
    with _open(source, advance) as read:
        while True:
            fresh = read(BLOCK_BYTES)
            carry += fresh
            at_end = len(fresh) < BLOCK_BYTES
            if not carry:
                if at_end and not offset and not source.may_be_empty:
                    raise UserError(f"{source.path}: the file is empty; remove it from the inputs")
                return
            cut_document = False
            if at_end:
                cut = len(carry)
            else:
                cut = _last_end(carry, source.kind)
                if not cut and len(carry) >= MAX_DOCUMENT_BYTES:
                    if source.kind == "jsonl":
                        raise UserError(
                            f"{source.path}, line {line}: longer than {MAX_DOCUMENT_BYTES >> 20} MiB; "
                            "a JSON-lines file holds one document per line"
                        )
                    cut = carry.rfind(b"\n") + 1 or carry.rfind(b" ") + 1 or _last_character(carry)
                    cut_document = True
                if not cut:
                    continue
            content, carry = carry[:cut], carry[cut:]
            yield Piece(source.kind, source.name, str(source.path), content, line, offset, cut_document, continued)
            continued = cut_document
            line += content.count(b"\n")
            offset += cut
            if at_end:
                return


def _last_end(content: bytes, kind: str) -> int:
    """Where the last whole document ends, 0 if none does."""
    if kind == "jsonl":
        return content.rfind(b"\n") + 1
    if (found := content.rfind(b"\n\n")) >= 0:
        return found + 2
    end = 0
    for match in _BLANK_LINE.finditer(content):
        end = match.end()
    return end


def _last_character(content: bytes) -> int:
    """Where the last UTF-8 character begins."""
    start = len(content) - 1
    while start > 1 and content[start] & 0xC0 == 0x80:
        start -= 1
    return start


@contextmanager
def _open(source: Source, advance: Progress) -> Iterator[Callable[[int], bytes]]:
    """A function that reads exactly so many decompressed bytes, fewer only at the end."""
    path = source.path
    assert path is not None
    opener = OPENERS.get(path.suffix.lower())
    try:
        with path.open("rb") as raw:
            file = opener(raw) if opener else raw
            seen = 0

            def read(num_bytes: int) -> bytes:
                nonlocal seen
                parts = []
                while num_bytes and (part := file.read(num_bytes)):
                    parts.append(part)
                    num_bytes -= len(part)
                advance(raw.tell() - seen)
                seen = raw.tell()
                return b"".join(parts)

            yield read
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged or not a {path.suffix} file ({error})") from None
    except OSError as error:
        if error.strerror is None:  # bz2's way to say it
            raise UserError(f"{path}: damaged or not a {path.suffix} file ({error})") from None
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _parquet_rows(source: Source, text_field: str, advance: Progress) -> Iterator[str | None]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"{source.path}: reading Parquet needs pyarrow; install largebatch[data]") from None
    assert source.path is not None
    try:
        with pq.ParquetFile(source.path) as file:
            schema = file.schema_arrow
            _check_field(f"{source.path}", text_field, schema.names)
            if (num := schema.names.count(text_field)) > 1:
                raise UserError(f"{source.path}: {num} columns are named {text_field!r}; give each a name of its own")
            kind = schema.field(text_field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise UserError(f"{source.path}: column {text_field!r} holds {kind}, not text; name another text field")
            size, num_rows = source.path.stat().st_size, max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(batch_size=_ROWS, columns=[text_field]):
                yield from batch.column(0).to_pylist()
                advance(size * batch.num_rows // num_rows)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{source.path}: damaged or not a Parquet file ({str(error).splitlines()[0]})") from None


def dataset_fingerprint(source: Source) -> str:
    """What changes when a data set does: its own fingerprint, or one of the files that it is read from."""
    rows, builder = _load_dataset(source)
    if builder is None:
        return str(getattr(rows, "_fingerprint", f"{rows.num_rows} rows"))
    found: list[Any] = []  # of local files the checksums, of others what their server says: a revision or an ETag
    for files in (builder.config.data_files or {}).values():
        local = all(Path(file).is_file() for file in files)
        found += [file_checksum(Path(file)) for file in files] if local else files.origin_metadata
    return sha256(repr(found or builder.hash).encode()).hexdigest()[:16]


def dataset_bytes(source: Source, text_field: str) -> int:
    """About how many bytes a data set holds, 0 if it does not say."""
    rows = _select_field(_load_dataset(source)[0], source, text_field)
    if hasattr(rows, "data"):
        return int(rows.data.nbytes)
    split = (rows.info.splits or {}).get(str(rows.split))
    return (split.num_bytes if split else rows.info.dataset_size) or 0


def _dataset_rows(source: Source, text_field: str) -> Iterator[str | None]:
    rows = _select_field(_load_dataset(source)[0], source, text_field)
    try:
        for batch in rows.iter(batch_size=_ROWS):
            _check_field(source.name, text_field, list(batch))
            yield from batch[text_field]
    except (UserError, UnicodeDecodeError):
        raise
    except _dataset_errors() as error:
        raise UserError(f"{source.name}: damaged, or out of reach: {_first_line(error)}") from None


def _load_dataset(source: Source) -> tuple[Any, Any]:
    """The rows of a data set, read when asked for, and what builds it, None for one that was saved."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{source.name}: reading Hugging Face data sets needs `datasets`; install largebatch[data]"
        ) from None
    assert source.dataset is not None
    name, config, split = source.dataset
    try:
        if (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file():
            return _saved_rows(source, datasets.load_from_disk(name)), None
        builder = datasets.load_dataset_builder(name, config)
        return builder.as_streaming_dataset(split=split or "train"), builder
    except UserError:
        raise
    except _dataset_errors() as error:
        raise UserError(f"{source.name}: the data set cannot be loaded: {_first_line(error)}") from None


def _saved_rows(source: Source, loaded: Any) -> Any:
    """Those of the split that was named, of what `save_to_disk` wrote."""
    assert source.dataset is not None
    name, config, split = source.dataset
    if config is not None:
        raise UserError(f"{source.name}: a saved data set has no configurations; a split of it is hf:{name}::{config}")
    if isinstance(loaded, dict):
        return loaded[split or "train"]
    if split not in (None, str(loaded.split)):
        raise UserError(f"{source.name}: the data set was saved without splits; name it as hf:{name}")
    return loaded


def _dataset_errors() -> tuple[type[Exception], ...]:
    from datasets.exceptions import DatasetsError

    return (OSError, ValueError, KeyError, DatasetsError)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _select_field(rows: Any, source: Source, text_field: str) -> Any:
    if not rows.column_names:  # a stream whose columns show only when it is read
        return rows
    _check_field(source.name, text_field, rows.column_names)
    return rows.select_columns([text_field])


def _check_field(where: str, text_field: str, fields: Sequence[str]) -> None:
    if text_field not in fields:
        raise UserError(f"{where}: no column {text_field!r}; there are {', '.join(fields)}; name one as the text field")
