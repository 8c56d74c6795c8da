"""Raw text -> a prepared corpus: the work behind `largebatch prepare`."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from largebatch.errors import UserError

from .corpus import CorpusSplit
from .documents import documents_of
from .integrity import expected_padding, length_histogram
from .manifest import Manifest, file_checksum
from .progress import Bar, Stage, progress_bar
from .shards import SHARD_TOKENS, SplitWriter, choose_documents
from .sources import BLOCK_BYTES, MAX_DOCUMENT_BYTES, Block, Source, find_sources, read_blocks
from .tokenise import BlockTokeniser, TokenBlock
from .vocabulary import Vocabulary
from .wordpiece import save_tokenizer, train_vocabulary
from .workspace import Workspace

# Changes whenever the same input and settings would give other bytes, so that no half-done work is carried over.
_PROCEDURE = 1
# A compressed file is taken to hold this many times its size when work is planned.
_EXPANSION = 4
# Below this a pool of processes costs more than it saves.
_MIN_PARALLEL_BYTES = 48 << 20


def prepare(
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    vocab_size: int = 30522,
    vocab: str | Path | None = None,
    lowercase: bool = True,
    text_field: str = "text",
    heldout: float = 0.01,
    drop_duplicates: bool = True,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
    overwrite: bool = False,
    vocab_sample_bytes: int = 64 << 20,
    shard_tokens: int = SHARD_TOKENS,
) -> Manifest:
    """Turn raw text into a corpus for pre-training: documents of sentences of WordPiece tokens, memory-mapped.

    1. Read documents: blank-line separated in text files, one per JSON line or table row.
    2. Train a WordPiece vocabulary on them, or take the given one.
    3. In parallel and block by block: split paragraphs into sentences, and these into word pieces.
    4. Drop exact duplicates and empty documents, put the held-out documents apart, write shards and offsets.
    5. Write the manifest, last, and give the directory its final name.

    The bytes written depend on the contents of the inputs and the settings, not on `workers`. A run that was killed
    is continued by calling it again: finished blocks lie in ``<out>.partial`` and are used if the input, the settings
    and the vocabulary are the same. If `out` is already the corpus asked for, nothing is done.

    Args:
        inputs: files (.txt, .jsonl, .json with an object per line, .parquet; the first three also .gz, .xz, .bz2;
            any other name is read as text), directories of them, or Hugging Face data sets, each
            ``hf:NAME[:CONFIG][:SPLIT]``.
        out: directory to make.
        vocab_size: of the vocabulary to train, the special tokens included; a small input may give fewer.
        vocab: a vocab.txt (or a directory with one) to use instead.
        lowercase: lower-case and strip accents, as BERT's uncased models do; a given `vocab` must have been made so.
        text_field: field or column that holds the text in JSON lines, Parquet and data sets.
        heldout: share of the documents put apart for evaluation, by a hash of their content.
        drop_duplicates: leave out documents equal to an earlier one; False keeps and only counts them.
        seed: of the held-out choice, and of the instances whose padding is reported.
        workers: processes; None is one per core, or none beside this one for a small input. More than one needs the
            calling script to be importable (``if __name__ == "__main__":``), as all of `multiprocessing` does.
        progress: show a bar with the remaining time if standard error is a terminal.
        overwrite: replace a corpus of other inputs or settings at `out`.
        vocab_sample_bytes: the vocabulary is trained on about this much text, in blocks spread evenly over the input.
        shard_tokens: tokens after which a new token file is begun.

    Returns:
        The manifest; `largebatch.data.render_report` makes its integrity report text.

    Raises:
        UserError: bad input or a directory in the way; nothing is left at `out`.
    """
    if not 0 <= heldout < 1:
        raise UserError(f"the held-out share must lie in [0, 1), got {heldout}")
    if workers is not None and workers < 1:
        raise UserError(f"workers must be at least 1, got {workers}")
    if vocab_sample_bytes < 1 or shard_tokens < 1:
        raise UserError("vocab_sample_bytes and shard_tokens must be at least 1")
    sources = find_sources(inputs)
    given_vocabulary = Vocabulary.read(vocab) if vocab is not None else None
    settings: dict[str, Any] = {
        "procedure": _PROCEDURE,
        "lowercase": lowercase,
        "text_field": text_field,
        "heldout": heldout,
        "drop_duplicates": drop_duplicates,
        "seed": seed,
        "block_bytes": BLOCK_BYTES,
        "max_document_bytes": MAX_DOCUMENT_BYTES,
        "shard_tokens": shard_tokens,
    }
    if given_vocabulary is None:
        settings |= {"vocab_size": vocab_size, "vocab_sample_bytes": vocab_sample_bytes}
    else:
        settings["vocab_sha256"] = sha256("\n".join(given_vocabulary.tokens).encode()).hexdigest()

    with progress_bar(progress) as bar, Workspace(Path(out)) as workspace:
        described = _describe(sources, bar)
        if (existing := workspace.existing(settings, described, overwrite)) is not None:
            return existing
        total_bytes = sum(_file_bytes(source) for source in sources) or None
        plan = {"inputs": described, "settings": settings}

        def train() -> Vocabulary:
            with bar.stage("training the vocabulary", None):
                sample = _vocabulary_sample(sources, text_field, vocab_sample_bytes)
                return train_vocabulary(sample, vocab_size, lowercase)

        vocabulary = workspace.vocabulary(plan, lambda: given_vocabulary or train())
        workspace.start_blocks({"settings": settings, "vocabulary": vocabulary.tokens})
        with bar.stage("tokenising", total_bytes) as stage:
            paths = _tokenise(
                sources, workspace, vocabulary, lowercase, text_field, _num_workers(workers, sources), stage
            )
        with bar.stage("writing", len(paths)) as stage:
            manifest = _assemble(paths, workspace, vocabulary, settings, described, stage)
        workspace.publish()
        return manifest


def _file_bytes(source: Source) -> int:
    return source.path.stat().st_size if source.path else 0


def _expanded_bytes(sources: Sequence[Source]) -> int:
    return sum(
        _file_bytes(source)
        * (_EXPANSION if source.path and source.path.suffix in (".gz", ".xz", ".bz2", ".parquet") else 1)
        for source in sources
    )


def _describe(sources: Sequence[Source], bar: Bar) -> list[dict[str, Any]]:
    """Name, size and checksum of every input file; of a data set, what there is to say: its name."""
    described: list[dict[str, Any]] = []
    with bar.stage("checking inputs", sum(map(_file_bytes, sources))) as stage:
        for source in sources:
            if source.path is None:
                described.append({"name": source.name})
                continue
            try:
                described.append(
                    {"name": source.name, "bytes": _file_bytes(source), "crc32": file_checksum(source.path)}
                )
            except OSError as error:
                raise UserError(f"{source.path}: cannot be read: {error.strerror}") from None
            stage.advance(_file_bytes(source))
    return described


def _num_workers(workers: int | None, sources: Sequence[Source]) -> int:
    if workers is not None:
        return workers
    if all(source.path for source in sources) and _expanded_bytes(sources) < _MIN_PARALLEL_BYTES:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _vocabulary_sample(sources: Sequence[Source], text_field: str, sample_bytes: int) -> Callable[[], Iterator[str]]:
    """The text to train the vocabulary on: every n-th block, up to twice the wanted size."""
    every = max(1, -(-_expanded_bytes(sources) // sample_bytes))

    def texts() -> Iterator[str]:
        taken = 0
        for number, block in enumerate(read_blocks(sources, text_field)):
            if number % every:
                continue
            for piece in block:
                for document in documents_of(piece, text_field):
                    text = "\n".join(document)
                    taken += len(text)
                    yield text
            if taken > 2 * sample_bytes:
                return

    return texts


_tokeniser: BlockTokeniser | None = None


def _start_worker(vocabulary: Vocabulary, lowercase: bool, text_field: str) -> None:
    global _tokeniser
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokeniser = BlockTokeniser(vocabulary, lowercase, text_field)


def _work(block: Block, path: Path) -> None:
    assert _tokeniser is not None
    _tokeniser(block).save(path)


def _tokenise(
    sources: Sequence[Source],
    workspace: Workspace,
    vocabulary: Vocabulary,
    lowercase: bool,
    text_field: str,
    workers: int,
    stage: Stage,
) -> list[Path]:
    """Make the token block of every block that has none yet; the paths of all, in input order."""
    paths: list[Path] = []

    def unfinished() -> Iterator[tuple[Block, Path]]:
        for number, block in enumerate(read_blocks(sources, text_field, stage.advance)):
            crc = 0
            for piece in block:
                crc = piece.crc32(crc)
            paths.append(workspace.blocks / f"{number:07d}-{crc:08x}.block")
            if not paths[-1].exists():
                yield block, paths[-1]

    if workers == 1:
        tokeniser = BlockTokeniser(vocabulary, lowercase, text_field)
        for block, path in unfinished():
            tokeniser(block).save(path)
        return paths
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (vocabulary, lowercase, text_field)
    )
    running: set[Future[None]] = set()
    try:
        for block, path in unfinished():
            running.add(pool.submit(_work, block, path))
            if len(running) >= workers + 2:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
        for future in running:
            future.result()
    except BrokenProcessPool:
        raise RuntimeError(
            "a worker process ended without a word (out of memory?); the same command continues where this one "
            "stopped, and fewer workers need less memory"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return paths


def _assemble(
    paths: Sequence[Path],
    workspace: Workspace,
    vocabulary: Vocabulary,
    settings: dict[str, Any],
    described: list[dict[str, Any]],
    stage: Stage,
) -> Manifest:
    """Write the final files from the token blocks, in input order."""
    directory = workspace.start_result()
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
        "document_tokens": length_histogram(np.concatenate(lengths["document"])),
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
