"""Raw text -> a prepared corpus: the work behind `largebatch prepare`."""

import errno
import os
from collections.abc import Iterator, Sequence
from hashlib import sha256
from inspect import signature
from pathlib import Path
from typing import Any

from largebatch.errors import UserError

from .assemble import assemble
from .blocks import BLOCK_BYTES, MAX_DOCUMENT_BYTES, dataset_bytes, dataset_fingerprint, read_blocks
from .documents import documents_of
from .manifest import Manifest, file_checksum
from .pool import tokenise_blocks
from .progress import Bar, Stage, progress_bar
from .shards import SHARD_TOKENS
from .sources import Source, find_sources
from .vocabulary import Vocabulary
from .wordpiece import train_vocabulary
from .workspace import Workspace

# Changes whenever the same input and settings would give other bytes, so that no half-done work is carried over.
_PROCEDURE = 3
# A compressed file is taken to hold this many times its size when work is planned.
_EXPANSION = 4
# Below this a pool of processes saves less than a second or two, and asks of the caller that its script be importable.
_MIN_PARALLEL_BYTES = 16 << 20


def prepare(
    inputs: str | Path | Sequence[str | Path],
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
            ``hf:NAME[:CONFIG][:SPLIT]``; one of them or several. Corpora inside a directory are left out of it.
        out: directory to make.
        vocab_size: of the vocabulary to train, the special tokens included; a small input may give fewer.
        vocab: a vocab.txt (or a directory with one) to use instead.
        lowercase: lower-case and strip accents, as BERT's uncased models do; a given `vocab` must have been made so,
            which a tokenizer_config.json beside it is asked for.
        text_field: field or column that holds the text in JSON lines, Parquet and data sets.
        heldout: share of the documents put apart for evaluation, by a hash of their content.
        drop_duplicates: leave out documents equal to an earlier one; False keeps and only counts them.
        seed: of the held-out choice, and of the instances whose padding is reported.
        workers: processes, each of which holds some 200 MB however large the input (2026-11-21; this one 100 MB and
            50 bytes a document). None is one per core, or none beside this one for a small input. More than one needs
            the calling script to be importable (``if __name__ == "__main__":``), as all of `multiprocessing` does.
        progress: show a bar with the remaining time if standard error is a terminal.
        overwrite: replace a corpus of other inputs or settings at `out`.
        vocab_sample_bytes: the vocabulary is trained on about this much text, in blocks spread evenly over the input;
            on up to twice as much from the beginning of a data set that does not say its size.
        shard_tokens: tokens after which a new token file is begun.

    Returns:
        The manifest; `largebatch.data.render_report` makes its integrity report text.

    Raises:
        UserError: bad input or a directory in the way; nothing is left at `out`, and finished blocks are kept.
    """
    settings = {name: value for name, value in locals().items() if name not in ("inputs", "out")}
    manifest = _prepare(inputs, Path(out), None, **settings)
    assert isinstance(manifest, Manifest)
    return manifest


def prepare_part(
    inputs: str | Path | Sequence[str | Path], out: str | Path, part: tuple[int, int], **settings: Any
) -> int:
    """Do the k-th of n shares of the tokenising that `prepare` would do; `prepare` itself then only puts them together.

    The shares may be done at once, by processes or machines that see the same ``<out>.partial``; on machines that do
    not, copy what is in it together afterwards. Blocks are dealt in turn, so shares are of like size. The vocabulary is
    trained by each part that finds none; give `vocab`, or let one part run ahead, to save the time. The bytes of the
    corpus are those that `prepare` would have written alone.

    Args:
        inputs, out: as for `prepare`.
        part: (k, n), 1 <= k <= n.
        settings: as for `prepare`, the same for all parts and for the call of `prepare` that ends the work.

    Returns:
        The number of blocks of this part, those included that an earlier, interrupted run had done; 0 if `out` is
        already the corpus asked for.

    Raises:
        UserError: bad input; the work of other parts is left alone.
    """
    k, n = part
    if not 1 <= k <= n:
        raise UserError(f"part {k}/{n}: give k/n with 1 <= k <= n")
    defaults = {p.name: p.default for p in signature(prepare).parameters.values() if p.kind is p.KEYWORD_ONLY}
    unknown = settings.keys() - defaults.keys()
    if unknown:
        raise TypeError(f"prepare_part() got an unexpected keyword argument {min(unknown)!r}")
    done = _prepare(inputs, Path(out), part, **(defaults | settings))
    return done if isinstance(done, int) else 0


def _prepare(
    inputs: str | Path | Sequence[str | Path],
    out: Path,
    part: tuple[int, int] | None,
    *,
    vocab_size: int,
    vocab: str | Path | None,
    lowercase: bool,
    text_field: str,
    heldout: float,
    drop_duplicates: bool,
    seed: int,
    workers: int | None,
    progress: bool,
    overwrite: bool,
    vocab_sample_bytes: int,
    shard_tokens: int,
) -> Manifest | int:
    """Do the whole work and return the manifest, or a part of it and return its number of blocks."""
    if not 0 <= heldout < 1:
        raise UserError(f"the held-out share must lie in [0, 1), got {heldout}")
    if workers is not None and workers < 1:
        raise UserError(f"workers must be at least 1, got {workers}")
    if vocab_sample_bytes < 1 or shard_tokens < 1:
        raise UserError("vocab_sample_bytes and shard_tokens must be at least 1")
    workspace = Workspace(out, part)
    sources = find_sources(inputs)
    given_vocabulary = Vocabulary.read(vocab, lowercase=lowercase) if vocab is not None else None
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

    def train() -> Vocabulary:
        with bar.stage("sampling text", sum(map(_file_bytes, sources)) or None) as stage:
            sample = list(_vocabulary_sample(sources, text_field, vocab_sample_bytes, stage))
        with bar.stage("training the vocabulary", None):
            return train_vocabulary(sample, vocab_size, lowercase)

    try:
        with progress_bar(progress) as bar, workspace:
            described = _describe(sources, bar)
            if (existing := workspace.existing(settings, described, overwrite)) is not None:
                return existing
            plan = {"inputs": described, "settings": settings}
            vocabulary = workspace.vocabulary(plan, lambda: given_vocabulary or train())
            blocks = workspace.start_blocks({"settings": settings, "vocabulary": vocabulary.tokens})
            num_workers = _num_workers(workers, sources, text_field)
            with bar.stage("tokenising", sum(map(_file_bytes, sources)) or None) as stage:
                paths = tokenise_blocks(sources, blocks, vocabulary, lowercase, text_field, num_workers, stage, part)
            if part is not None:
                return len(paths)
            with bar.stage("writing", len(paths)) as stage:
                manifest = assemble(paths, workspace.start_result(), vocabulary, settings, described, stage)
            workspace.publish()
            return manifest
    except OSError as error:  # a full disk and the like; what is done stays, for the next run
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        raise UserError(
            f"{error.filename or out}: {error.strerror}; once that is mended, the same command continues"
        ) from None


def _file_bytes(source: Source) -> int:
    return source.path.stat().st_size if source.path else 0


def _expanded_bytes(sources: Sequence[Source], text_field: str) -> int:
    return sum(
        _file_bytes(source) * (_EXPANSION if source.path.suffix in (".gz", ".xz", ".bz2", ".parquet") else 1)
        if source.path
        else dataset_bytes(source, text_field)
        for source in sources
    )


def _describe(sources: Sequence[Source], bar: Bar) -> list[dict[str, Any]]:
    """Name, size and checksum of every input file; name and fingerprint of a data set."""
    described: list[dict[str, Any]] = []
    with bar.stage("checking inputs", sum(map(_file_bytes, sources))) as stage:
        for source in sources:
            # A file's name may be no text, which JSON has to be.
            name = source.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            if source.path is None:
                described.append({"name": name, "fingerprint": dataset_fingerprint(source)})
                continue
            try:
                described.append({"name": name, "bytes": _file_bytes(source), "crc32": file_checksum(source.path)})
            except OSError as error:
                raise UserError(f"{source.path}: cannot be read: {error.strerror}") from None
            stage.advance(_file_bytes(source))
    return described


def _num_workers(workers: int | None, sources: Sequence[Source], text_field: str) -> int:
    if workers is not None:
        return workers
    if all(source.path for source in sources) and _expanded_bytes(sources, text_field) < _MIN_PARALLEL_BYTES:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _vocabulary_sample(sources: Sequence[Source], text_field: str, sample_bytes: int, stage: Stage) -> Iterator[str]:
    """The documents to train the vocabulary on: every n-th block, up to twice the wanted size."""
    every = max(1, -(-_expanded_bytes(sources, text_field) // sample_bytes))
    taken = 0
    for number, block in enumerate(read_blocks(sources, text_field, stage.advance)):
        if number % every:
            continue
        for piece in block:
            for document in documents_of(piece, text_field):
                text = "\n".join(document)
                taken += len(text)
                yield text
        if taken > 2 * sample_bytes:
            return
