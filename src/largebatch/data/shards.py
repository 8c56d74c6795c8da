"""From token blocks to the final files: duplicates dropped, held-out documents apart, everything in input order."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .counter_rng import fold_key, mix64
from .tokenise import TokenBlock

SHARD_TOKENS = 1 << 28
_STREAM_HELDOUT = 0x4E1D


@dataclass(frozen=True)
class DocumentTable:
    """All documents of all blocks, in input order."""

    block: NDArray[np.uint32]
    hashes: NDArray[np.uint64]
    duplicate: NDArray[np.bool_]
    heldout: NDArray[np.bool_]
    kept: NDArray[np.bool_]


def choose_documents(
    hashes_of_blocks: Sequence[NDArray[np.uint64]], heldout: float, seed: int, drop_duplicates: bool
) -> DocumentTable:
    """Which documents are duplicates, which are held out, which are kept.

    A document is held out if a keyed hash of its content lies in the lowest `heldout` share of all 64-bit values, so
    equal documents are never on both sides; if none does, the lowest one is (unless all documents are equal). Two
    different documents among 10**8 share a hash with probability 3e-4; such a pair counts as duplicates.

    Args:
        hashes_of_blocks: of all documents; some 50 bytes of memory each are needed beside them.
        heldout: share of the documents, in [0, 1).
    """
    hashes = np.concatenate([*hashes_of_blocks, np.zeros(0, dtype=np.uint64)])
    block = np.repeat(np.arange(len(hashes_of_blocks), dtype=np.uint32), [len(part) for part in hashes_of_blocks])
    duplicate = np.ones(len(hashes), dtype=bool)
    duplicate[np.unique(hashes, return_index=True)[1]] = False
    held = np.zeros(len(hashes), dtype=bool)
    if heldout > 0 and len(hashes):
        keyed = mix64(hashes ^ np.uint64(fold_key(_STREAM_HELDOUT, seed)))
        held = keyed < np.uint64(int(heldout * 2.0**64))
        if not held.any() and (hashes != hashes[0]).any():
            held = keyed == keyed.min()
    kept = ~duplicate if drop_duplicates else np.ones(len(hashes), dtype=bool)
    return DocumentTable(block, hashes, duplicate, held, kept)


class SplitWriter:
    """Writes one split: `tokens-NNNNN.npy` of whole documents, `sentence_offsets.npy`, `document_offsets.npy`."""

    def __init__(self, directory: Path, dtype: type, shard_tokens: int) -> None:
        directory.mkdir(parents=True)
        self._directory = directory
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._shard_tokens = shard_tokens
        self._shards: list[dict[str, Any]] = []
        self._shard: _ArrayWriter | None = None
        self._sentences = _ArrayWriter(directory / "sentence_offsets.npy", np.dtype("<i8"))
        self._documents = _ArrayWriter(directory / "document_offsets.npy", np.dtype("<i8"))
        self._sentences.append(np.zeros(1))
        self._documents.append(np.zeros(1))
        self.num_documents = self.num_sentences = self.num_tokens = 0

    def append(self, block: TokenBlock, chosen: NDArray[np.bool_]) -> None:
        """Append the chosen documents of a block."""
        if not chosen.any():
            return
        in_sentence = np.repeat(chosen, block.document_lengths)
        sentence_lengths = block.sentence_lengths[in_sentence].astype(np.int64)
        document_lengths = block.document_lengths[chosen].astype(np.int64)
        tokens = block.tokens[np.repeat(in_sentence, block.sentence_lengths)]
        sentence_ends = np.cumsum(sentence_lengths)
        document_ends = np.cumsum(document_lengths)
        self._sentences.append(self.num_tokens + sentence_ends)
        self._documents.append(self.num_sentences + document_ends)
        self._append_tokens(tokens, sentence_ends[document_ends - 1])
        self.num_documents += len(document_lengths)
        self.num_sentences += len(sentence_lengths)

    def _append_tokens(self, tokens: NDArray, document_ends: NDArray[np.int64]) -> None:
        """Into the current shard as many whole documents as fit, at least one; the rest into further shards."""
        start = 0
        while start < len(tokens):
            if self._shard is None:
                name = f"tokens-{len(self._shards):05d}.npy"
                self._shard = _ArrayWriter(self._directory / name, self._dtype)
                self._shards.append({"file": f"{self._directory.name}/{name}", "first_token": self.num_tokens})
            room = self._shard_tokens - self._shard.num
            fitting = document_ends[document_ends <= start + room]
            end = int(fitting[-1]) if len(fitting) else start
            if end <= start and not self._shard.num:
                end = int(document_ends[document_ends > start][0])
            self._shard.append(tokens[start:end])
            self.num_tokens += max(end - start, 0)
            if end < len(tokens):
                self._close_shard()
            start = max(end, start)

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shards[-1]["tokens"] = self._shard.num
            self._shard.close()
            self._shard = None

    def close(self) -> dict[str, Any]:
        """Complete the files and give their description for the manifest."""
        self._close_shard()
        self._sentences.close()
        self._documents.close()
        return {
            "documents": self.num_documents,
            "sentences": self.num_sentences,
            "tokens": self.num_tokens,
            "shards": self._shards,
        }


class _ArrayWriter:
    """A 1-D .npy file of unknown length: the header, of fixed size, is written again at the end."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self._file = path.open("w+b")
        self._dtype = dtype
        self.num = 0
        self._write_header()

    def _write_header(self) -> None:
        self._file.seek(0)
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self.num,)}
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, values: NDArray) -> None:
        self._file.write(np.ascontiguousarray(values, dtype=self._dtype).tobytes())
        self.num += len(values)

    def close(self) -> None:
        end = self._file.tell()
        self._write_header()
        assert self._file.tell() <= end
        self._file.close()
