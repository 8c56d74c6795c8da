"""From token blocks to a corpus: duplicates dropped, splits written, everything counted."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from largebatch.errors import UserError

from .corpus import CorpusSplit
from .integrity import LengthHistogram, expected_padding
from .manifest import Manifest, file_checksum
from .progress import Stage
from .shards import SplitWriter, choose_documents
from .tokenise import TokenBlock
from .vocabulary import Vocabulary
from .wordpiece import save_tokenizer

# In a corpus that is not tiny, a document with more than this share of all tokens is worth a note.
_LARGE_DOCUMENT, _TINY_TOKENS = 0.02, 1_000_000


def assemble(
    paths: Sequence[Path],
    directory: Path,
    vocabulary: Vocabulary,
    settings: dict[str, Any],
    described: list[dict[str, Any]],
    stage: Stage,
) -> Manifest:
    """Write all files of a corpus into the empty `directory`, from token blocks in input order; the manifest last."""
    dtype = np.uint16 if len(vocabulary) < 1 << 16 else np.uint32
    hashes = [TokenBlock.load_hashes(path) for path in paths]
    table = choose_documents(hashes, settings["heldout"], settings["seed"], settings["drop_duplicates"])
    if not len(table.hashes):
        raise UserError("no document in the input: every one is empty")
    writers = {name: SplitWriter(directory / name, dtype, settings["shard_tokens"]) for name in ("train", "heldout")}
    counts = np.zeros(3, dtype=np.int64)
    num_unknown = num_characters = first = 0
    sentence_histogram, document_histogram = LengthHistogram(), LengthHistogram()
    for path in paths:
        block = TokenBlock.load(path)
        mine = slice(first, first + len(block.hashes))
        first = mine.stop
        kept, held = table.kept[mine], table.heldout[mine]
        writers["train"].append(block, kept & ~held)
        writers["heldout"].append(block, kept & held)
        counts += block.counts
        num_unknown += int(block.unknown[kept].sum())
        num_characters += int(block.characters[kept].sum())
        sentence_histogram.add(block.sentence_lengths[np.repeat(kept, block.document_lengths)])
        document_histogram.add(document_tokens(block)[kept])
        stage.advance(1)
    splits = {name: writer.close() for name, writer in writers.items()}
    if not splits["train"]["documents"]:
        raise UserError("no document is left to train on; lower the held-out share or add input")

    save_tokenizer(vocabulary, settings["lowercase"], directory)
    num_tokens = sum(split["tokens"] for split in splits.values())
    sentence_offsets, document_offsets = (
        np.load(directory / "train" / f"{kind}_offsets.npy", mmap_mode="r") for kind in ("sentence", "document")
    )
    train = CorpusSplit("train", [], sentence_offsets, document_offsets, vocabulary)
    notes = []
    share = document_histogram.largest / num_tokens
    if num_tokens > _TINY_TOKENS and share > _LARGE_DOCUMENT:
        notes.append(
            f"the largest document holds {share:.0%} of all tokens; documents are what is held out, paired and packed "
            "to a short target: cut books into chapters"
        )
    if "vocab_size" in settings and len(vocabulary) < settings["vocab_size"]:
        notes.append(f"the text gave a vocabulary of {len(vocabulary)} pieces only, not {settings['vocab_size']}")
    if settings["heldout"] and not splits["heldout"]["documents"]:
        notes.append("no document is held out: there is but one different document")
    report = {
        "documents": {
            "read": len(table.hashes) + int(counts[0]),
            "train": splits["train"]["documents"],
            "heldout": splits["heldout"]["documents"],
            "empty": int(counts[0]),
            "duplicate": int(table.duplicate.sum()),
            "cut": int(counts[1]),
        },
        "sentences": sum(split["sentences"] for split in splits.values()),
        "tokens": num_tokens,
        "characters": num_characters,
        "unknown_tokens": num_unknown,
        "unknown_rate": num_unknown / num_tokens,
        "document_tokens": document_histogram.bins(),
        "sentence_tokens": sentence_histogram.bins(),
        "padding": expected_padding(train, settings["seed"]),
        "notes": notes,
    }
    files = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "crc32": file_checksum(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    manifest = Manifest(
        tokenizer={
            "sha256": sha256((directory / "tokenizer.json").read_bytes()).hexdigest(),
            "vocab_size": len(vocabulary),
            "lowercase": settings["lowercase"],
            "special_ids": vocabulary.special_ids,
        },
        token_dtype=np.dtype(dtype).name,
        splits=splits,
        files=files,
        settings=settings,
        inputs=described,
        report=report,
    )
    manifest.write(directory)
    return manifest


def document_tokens(block: TokenBlock) -> NDArray[np.int64]:
    """The number of tokens of each document of a block."""
    ends = np.cumsum(block.sentence_lengths, dtype=np.int64)[np.cumsum(block.document_lengths) - 1]
    return np.diff(ends, prepend=0)
