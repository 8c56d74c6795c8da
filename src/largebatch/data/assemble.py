"""From token blocks to a corpus: duplicates dropped, splits written, everything counted."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from largebatch.errors import UserError

from .corpus import CorpusSplit
from .integrity import expected_padding, length_histogram
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
    hashes = [TokenBlock.load(path).hashes for path in paths]
    table = choose_documents(hashes, settings["heldout"], settings["seed"], settings["drop_duplicates"])
    if not len(table.hashes):
        raise UserError("no document in the input: every one is empty")
    writers = {name: SplitWriter(directory / name, dtype, settings["shard_tokens"]) for name in ("train", "heldout")}
    counts = np.zeros(3, dtype=np.int64)
    num_unknown = first = 0
    for path in paths:
        block = TokenBlock.load(path)
        mine = slice(first, first + len(block.hashes))
        first = mine.stop
        kept, held = table.kept[mine], table.heldout[mine]
        writers["train"].append(block, kept & ~held)
        writers["heldout"].append(block, kept & held)
        counts += block.counts
        num_unknown += int(block.unknown[kept].sum())
        stage.advance(1)
    splits = {name: writer.close() for name, writer in writers.items()}
    if not splits["train"]["documents"]:
        raise UserError("no document is left to train on; lower the held-out share or add input")

    save_tokenizer(vocabulary, settings["lowercase"], directory)
    num_tokens = sum(split["tokens"] for split in splits.values())
    lengths: dict[str, list[Any]] = {"document": [], "sentence": []}
    for name in splits:
        sentence_offsets, document_offsets = (
            np.load(directory / name / f"{kind}_offsets.npy", mmap_mode="r") for kind in ("sentence", "document")
        )
        lengths["document"].append(np.diff(sentence_offsets[document_offsets]))
        lengths["sentence"].append(np.diff(sentence_offsets))
        if name == "train":
            train = CorpusSplit(name, [], sentence_offsets, document_offsets, vocabulary)
    notes = []
    document_tokens = np.concatenate(lengths["document"])
    share = int(document_tokens.max()) / num_tokens
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
        "characters": int(counts[2]),
        "unknown_tokens": num_unknown,
        "unknown_rate": num_unknown / num_tokens,
        "document_tokens": length_histogram(document_tokens),
        "sentence_tokens": length_histogram(np.concatenate(lengths["sentence"])),
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
