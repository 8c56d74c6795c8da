"""From blocks to documents of clean paragraphs; bad input is refused here, by file, line and byte."""

import json
from collections.abc import Iterator

from largebatch.errors import UserError

from .blocks import Piece

Document = list[str]
# Of the bytes: half of them in UTF-16 of Latin letters, hardly one in UTF-8.
_MANY_NULS = 0.25


def documents_of(piece: Piece, text_field: str) -> Iterator[Document]:
    """The documents of a piece, each a list of paragraphs in which single spaces are the only white space.

    A text file separates documents by blank lines and has one paragraph per line. A JSON line or a table row is one
    document, which may be empty, and whose line breaks separate paragraphs.

    Raises:
        UserError: not UTF-8, or UTF-16 that can be read as such, no JSON object in a line, no text in its text field.
    """
    if isinstance(piece.content, list):
        for row, text in enumerate(piece.content, piece.first_line):
            if text is not None and not isinstance(text, str):
                raise UserError(f"{piece.where}, row {row}: {text_field!r} holds {type(text).__name__}, not text")
            yield _paragraphs(text or "")
    elif piece.kind == "jsonl":
        yield from _json_documents(piece, piece.content, text_field)
    else:
        document: Document = []
        for line in _decode(piece, piece.content).split("\n"):
            if paragraph := " ".join(line.split()):
                document.append(paragraph)
            elif document:
                yield document
                document = []
        if document:
            yield document


def _decode(piece: Piece, content: bytes) -> str:
    if piece.first_byte == 0 and content.startswith(b"\xef\xbb\xbf"):
        content = content[3:]
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = piece.first_line + content.count(b"\n", 0, error.start)
        raise UserError(
            f"{piece.where}, line {line}: not UTF-8 at byte {piece.first_byte + error.start} "
            f"(0x{content[error.start]:02x}); convert the file, for example with `iconv -t UTF-8`"
        ) from None
    if content.count(0) > _MANY_NULS * len(content):
        raise UserError(
            f"{piece.where}: full of NUL bytes, as UTF-16 is; convert the file with `iconv -f UTF-16LE -t UTF-8`"
        )
    return text


def _json_documents(piece: Piece, content: bytes, text_field: str) -> Iterator[Document]:
    for number, line in enumerate(_decode(piece, content).split("\n"), piece.first_line):
        if not line.strip():
            continue
        where = f"{piece.where}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            hint = "; a JSON array is not JSON lines" if line.lstrip().startswith("[") else ""
            raise UserError(f"{where}: not JSON ({error}); one JSON object per line is expected{hint}") from None
        except RecursionError:
            raise UserError(f"{where}: JSON nested too deeply to be read; keep only the text and its field") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: holds a JSON {type(row).__name__}, not an object with a field {text_field!r}")
        if text_field not in row:
            fields = ", ".join(map(str, row)) or "none"
            raise UserError(f"{where}: no field {text_field!r} (fields: {fields}); name the text field")
        text = row[text_field]
        if text is not None and not isinstance(text, str):
            raise UserError(f"{where}: field {text_field!r} holds a JSON {type(text).__name__}, not text")
        yield _paragraphs(text or "")


def _paragraphs(text: str) -> Document:
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell and UTF-8 cannot
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return [paragraph for line in text.split("\n") if (paragraph := " ".join(line.split()))]
