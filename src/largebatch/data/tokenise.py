"""From a block of input to arrays of tokens: what one worker does."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from hashlib import blake2b
from pathlib import Path
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from .blocks import Block
from .documents import Document, documents_of
from .sentences import split_sentences
from .vocabulary import Vocabulary
from .wordpiece import WordEncoder

# Sentences are encoded in lots of about this many characters.
_LOT_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class TokenBlock:
    """The documents of one block, empty ones left out.

    Attributes:
        hashes: uint64, of each document's text; equal for the same paragraphs, whatever white space is within and
            between them.
        tokens: token ids of all sentences in a row.
        sentence_lengths: tokens of each sentence, none zero.
        document_lengths: sentences of each document, none zero.
        unknown: unknown tokens of each document.
        characters: of each document.
        counts: [documents without a token, documents cut for length, further parts of these].
    """

    hashes: NDArray[np.uint64]
    tokens: NDArray[np.unsignedinteger]
    sentence_lengths: NDArray[np.uint32]
    document_lengths: NDArray[np.uint32]
    unknown: NDArray[np.uint32]
    characters: NDArray[np.uint32]
    counts: NDArray[np.int64]

    def save(self, path: Path) -> None:
        temporary = path.with_suffix(f".{uuid4().hex}.tmp")  # which no worker of a killed run can be writing, too
        try:
            with temporary.open("wb") as file:
                for field in fields(self):
                    values = getattr(self, field.name)
                    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(values))
                    file.write(values.data)  # `np.save` does not say that a disk is full
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> "TokenBlock":
        with path.open("rb") as file:
            return cls(*(np.load(file) for _ in fields(cls)))

    @classmethod
    def is_whole(cls, path: Path) -> bool:
        """Is there a block, and can it be read? A machine that lost its power may have left an empty file."""
        try:
            cls.load(path)
        except (OSError, EOFError, ValueError):
            return False
        return True

    @staticmethod
    def load_hashes(path: Path) -> NDArray[np.uint64]:
        """The hashes alone, which come first in the file."""
        with path.open("rb") as file:
            return np.load(file)


class BlockTokeniser:
    """Makes a `TokenBlock` of a block of input.

    Args:
        vocabulary, lowercase: as in `WordEncoder`.
        text_field: of JSON lines.
    """

    def __init__(self, vocabulary: Vocabulary, lowercase: bool, text_field: str) -> None:
        self._encoder = WordEncoder(vocabulary, lowercase)
        self._unknown_id = vocabulary.special_ids["[UNK]"]
        self._text_field = text_field
        self.dtype = np.uint16 if len(vocabulary) < 1 << 16 else np.uint32

    def __call__(self, block: Block) -> TokenBlock:
        tokens, sentence_lengths, document_lengths, hashes, unknown, characters = [], [], [], [], [], []
        documents = [document for piece in block for document in documents_of(piece, self._text_field)]
        for lot in _lots(documents):
            sentences: list[str] = []
            num_sentences = np.zeros(len(lot), dtype=np.int64)
            for index, document in enumerate(lot):
                before = len(sentences)
                for paragraph in document:
                    sentences += split_sentences(paragraph)
                num_sentences[index] = len(sentences) - before
                text = "\n".join(document)
                characters.append(len(text))
                hashes.append(blake2b(text.encode(), digest_size=8).digest())
            lot_tokens, lengths = self._encoder.encode(sentences)
            document_of = np.repeat(np.arange(len(lot)), num_sentences)
            unknown_tokens = np.repeat(document_of, lengths)[lot_tokens == self._unknown_id]
            tokens.append(lot_tokens.astype(self.dtype))
            sentence_lengths.append(lengths[lengths > 0].astype(np.uint32))
            document_lengths.append(np.bincount(document_of[lengths > 0], minlength=len(lot)).astype(np.uint32))
            unknown.append(np.bincount(unknown_tokens, minlength=len(lot)).astype(np.uint32))
        document_lengths_all = _joined(document_lengths, np.uint32)
        kept = document_lengths_all > 0
        return TokenBlock(
            hashes=np.frombuffer(b"".join(hashes), dtype="<u8")[kept],
            tokens=_joined(tokens, self.dtype),
            sentence_lengths=_joined(sentence_lengths, np.uint32),
            document_lengths=document_lengths_all[kept],
            unknown=_joined(unknown, np.uint32)[kept],
            characters=np.array(characters, dtype=np.uint32)[kept],
            counts=np.array(
                [
                    (~kept).sum(),
                    sum(piece.cut and not piece.continued for piece in block),
                    sum(piece.continued for piece in block),
                ],
                dtype=np.int64,
            ),
        )


def _joined(parts: list[NDArray], dtype: type) -> NDArray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)


def _lots(documents: list[Document]) -> Iterator[list[Document]]:
    lot: list[Document] = []
    size = 0
    for document in documents:
        lot.append(document)
        size += sum(map(len, document))
        if size >= _LOT_CHARACTERS:
            yield lot
            lot, size = [], 0
    if lot:
        yield lot
