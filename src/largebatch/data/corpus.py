"""A prepared corpus on disk: documents of sentences of token ids, memory-mapped."""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from largebatch.errors import UserError

from .manifest import Manifest, file_checksum
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class CorpusSplit:
    """Documents of sentences of token ids, with random access in constant time.

    Args:
        name: "train" or "heldout".
        shards: the tokens, as consecutive 1-D arrays; a document lies within one of them.
        sentence_offsets: int64 [num_sentences + 1], the first token of each sentence, and the end.
        document_offsets: int64 [num_documents + 1], the first sentence of each document, and the end.
        vocabulary: of the token ids.
        directory: of the corpus that can be opened again for this split, None if there is none. With it, a pickled
            split is its address and not its tokens.
    """

    def __init__(
        self,
        name: str,
        shards: Sequence[NDArray[Any]],
        sentence_offsets: NDArray[np.int64],
        document_offsets: NDArray[np.int64],
        vocabulary: Vocabulary,
        directory: Path | None = None,
    ) -> None:
        self.name = name
        self._directory = directory
        self.vocabulary = vocabulary
        self.sentence_offsets = np.asarray(sentence_offsets)
        self.document_offsets = np.asarray(document_offsets)
        self._shards = [np.asarray(shard) for shard in shards]
        self._shard_starts = np.concatenate([[0], np.cumsum([len(shard) for shard in self._shards], dtype=np.int64)])
        self.num_documents = len(self.document_offsets) - 1
        self.num_sentences = len(self.sentence_offsets) - 1
        self.num_tokens = int(self._shard_starts[-1])

    @classmethod
    def from_documents(
        cls, documents: Sequence[Sequence[Sequence[int]]], vocabulary: Vocabulary, name: str = "train"
    ) -> "CorpusSplit":
        """A split in memory, from nested lists of token ids; empty sentences and documents are left out."""
        kept = [[sentence for sentence in document if len(sentence)] for document in documents]
        kept = [document for document in kept if document]
        sentences = [sentence for document in kept for sentence in document]
        tokens = np.array([token for sentence in sentences for token in sentence], dtype=np.uint32)
        sentence_offsets = np.cumsum([0] + [len(sentence) for sentence in sentences], dtype=np.int64)
        document_offsets = np.cumsum([0] + [len(document) for document in kept], dtype=np.int64)
        return cls(name, [tokens], sentence_offsets, document_offsets, vocabulary)

    def take(self, positions: NDArray[np.int64]) -> NDArray[Any]:
        """The tokens at the given positions of the split, of any shape."""
        if len(self._shards) == 1:
            return self._shards[0].take(positions)
        flat = positions.ravel()
        shard_of = np.searchsorted(self._shard_starts, flat, side="right") - 1
        result = np.empty(flat.shape, dtype=self._shards[0].dtype)
        for shard in np.unique(shard_of):
            chosen = shard_of == shard
            result[chosen] = self._shards[shard].take(flat[chosen] - self._shard_starts[shard])
        return result.reshape(positions.shape)

    def tokens(self, start: int = 0, stop: int | None = None) -> Iterator[NDArray[Any]]:
        """The tokens from `start` to `stop` in order, in pieces that need no copy."""
        stop = self.num_tokens if stop is None else stop
        for shard, first in zip(self._shards, self._shard_starts[:-1].tolist(), strict=True):
            piece = shard[max(0, start - first) : max(0, stop - first)]
            if len(piece):
                yield piece

    def document(self, index: int) -> list[NDArray[Any]]:
        """The sentences of one document."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        first, last = self.document_offsets[index : index + 2]
        bounds = self.sentence_offsets[first : last + 1]
        pieces = list(self.tokens(int(bounds[0]), int(bounds[-1])))
        return np.split(np.concatenate(pieces), bounds[1:-1] - bounds[0])

    def __reduce__(self) -> tuple[Any, ...]:
        if self._directory is not None:
            return _open_split, (self._directory, self.name)
        return CorpusSplit, (self.name, self._shards, self.sentence_offsets, self.document_offsets, self.vocabulary)

    def __len__(self) -> int:
        return self.num_documents

    def __getitem__(self, index: int) -> list[NDArray[Any]]:
        return self.document(index)

    def __iter__(self) -> Iterator[list[NDArray[Any]]]:
        return (self.document(index) for index in range(self.num_documents))


class Corpus:
    """A directory that `prepare` made, opened for reading; see `Corpus.open`."""

    def __init__(self, directory: Path, manifest: Manifest, vocabulary: Vocabulary) -> None:
        self.directory = directory
        self.manifest = manifest
        self.vocabulary = vocabulary

    @classmethod
    def open(cls, directory: str | Path, *, verify: bool = True) -> "Corpus":
        """Check a prepared corpus and map it into memory.

        Args:
            directory: what `prepare` was given as `out`.
            verify: also read every file and compare its checksum, about 1.5 s per GiB; sizes, the manifest and the
                tokenizer are checked in any case.

        Raises:
            UserError: the directory is no corpus, of another version, or a file is missing, cut short or damaged.
        """
        directory = Path(directory)
        manifest = Manifest.read(directory)
        for name, expected in manifest.files.items():
            path = directory / name
            if not path.is_file():
                raise UserError(f"{path}: missing; prepare the corpus again")
            if (size := path.stat().st_size) != expected["bytes"]:
                raise UserError(
                    f"{path}: {size} bytes, but the manifest says {expected['bytes']} (cut short or replaced); "
                    "prepare the corpus again"
                )
        tokenizer_hash = hashlib.sha256((directory / "tokenizer.json").read_bytes()).hexdigest()
        if tokenizer_hash != manifest.tokenizer["sha256"]:
            raise UserError(
                f"{directory / 'tokenizer.json'}: not the tokenizer the tokens were made with (sha256 differs from "
                "the manifest's); restore it or prepare the corpus again"
            )
        if verify:
            with ThreadPoolExecutor(max_workers=4) as pool:
                found = pool.map(lambda name: file_checksum(directory / name), manifest.files)
                for (name, expected), checksum in zip(manifest.files.items(), found, strict=True):
                    if checksum != expected["crc32"]:
                        raise UserError(
                            f"{directory / name}: damaged (CRC-32 {checksum}, the manifest says {expected['crc32']}); "
                            "prepare the corpus again"
                        )
        vocabulary = Vocabulary.read(directory / "vocab.txt")
        if len(vocabulary) != manifest.tokenizer["vocab_size"]:
            raise UserError(
                f"{directory / 'vocab.txt'}: {len(vocabulary)} pieces, but the tokens were made with "
                f"{manifest.tokenizer['vocab_size']}; restore it or prepare the corpus again"
            )
        return cls(directory, manifest, vocabulary)

    @property
    def vocab_size(self) -> int:
        """Number of word pieces, special tokens included."""
        return len(self.vocabulary)

    @property
    def identity(self) -> str:
        """A hash of the tokens, their order and the tokenizer: the same for a copy, under whatever name."""
        tokens = sorted((name, of["crc32"]) for name, of in self.manifest.files.items() if name.endswith(".npy"))
        return hashlib.sha256(repr((tokens, self.manifest.tokenizer["sha256"])).encode()).hexdigest()

    @property
    def special_ids(self) -> dict[str, int]:
        """The ids of [PAD], [UNK], [CLS], [SEP] and [MASK]."""
        return self.vocabulary.special_ids

    @property
    def tokenizer_files(self) -> list[Path]:
        """What `transformers` needs beside a model: vocab.txt, tokenizer.json, tokenizer_config.json."""
        return [self.directory / name for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json")]

    def tokenizer(self) -> "Tokenizer":
        """The tokenizer as a `tokenizers.Tokenizer`."""
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.directory / "tokenizer.json"))

    def split(self, name: str) -> CorpusSplit:
        """The documents of "train" or of "heldout".

        Raises:
            UserError: there is no such split, or it is empty.
        """
        if name not in self.manifest.splits:
            raise UserError(f"{self.directory}: no split {name!r}; there are {', '.join(self.manifest.splits)}")
        content = self.manifest.splits[name]
        if not content["documents"]:
            raise UserError(f"{self.directory}: the split {name!r} holds no document; prepare it with a larger share")

        def load(file: str) -> NDArray[Any]:
            return np.load(self.directory / file, mmap_mode="r")

        return CorpusSplit(
            name,
            [load(shard["file"]) for shard in content["shards"]],
            load(f"{name}/sentence_offsets.npy"),
            load(f"{name}/document_offsets.npy"),
            self.vocabulary,
            self.directory.absolute(),
        )


def _open_split(directory: Path, name: str) -> CorpusSplit:
    return Corpus.open(directory, verify=False).split(name)
