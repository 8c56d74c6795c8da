"""`largebatch bench data`: preparing text beside the bare tokenizer, and making instances."""

import lzma
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from largebatch.data import Corpus, PretrainingInstances, epoch_order, prepare
from largebatch.data.reference_instances import reference_epoch

from .bert import TEXT

LOT_LINES = 20_000


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def bench_data(text: Path | None = None, vocab: Path | None = None, *, repeats: int = 3) -> list[dict[str, Any]]:
    """Time preparing and instances; runs alternate, and the fastest of each counts.

    Preparing (reading, sentences, word pieces, duplicates, shards, checksums, report) stands beside `encode_batch` of
    `tokenizers`, which uses all cores too and does nothing else. The instances stand beside a reference that makes them
    token by token.

    Args:
        text: a plain text file; the shipped corpus without it.
        vocab: a vocab.txt; without it one of 8,192 pieces is trained first.
        repeats: how often each is run.
    """
    with tempfile.TemporaryDirectory() as folder:
        if text is None:
            text = Path(folder) / "text.txt"
            text.write_bytes(lzma.decompress((TEXT / "gutenberg.txt.xz").read_bytes()))
        megabytes = text.stat().st_size / 1e6
        corpus_path = Path(folder) / "corpus"
        prepare([text], corpus_path, vocab=vocab, vocab_size=8192, progress=False)
        corpus = Corpus.open(corpus_path)
        ours, peer = _preparing(text, vocab or corpus_path / "vocab.txt", repeats)
        tokens, cores = corpus.manifest.report["tokens"], len(os.sched_getaffinity(0))
        shared = {"benchmark": "preparing", "megabytes": megabytes, "tokens": tokens, "cores": cores}
        rows: list[dict[str, Any]] = [
            {**shared, "name": "largebatch prepare", "s": ours, "mb_per_s": megabytes / ours, "ratio": ours / peer},
            {**shared, "name": "tokenizers encode_batch", "s": peer, "mb_per_s": megabytes / peer, "ratio": 1.0},
        ]
        rows += [_instances(corpus, length, whole, repeats) for length in (128, 512) for whole in (False, True)]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        return [*rows, {"benchmark": "memory", "name": "peak of the process, MB", "mb": peak}]


def _preparing(text: Path, vocab: Path, repeats: int) -> tuple[float, float]:
    from tokenizers import BertWordPieceTokenizer

    tokenizer = BertWordPieceTokenizer(str(vocab))._tokenizer
    lines = text.read_text(encoding="utf-8").split("\n")

    def peer() -> None:
        for first in range(0, len(lines), LOT_LINES):
            for encoding in tokenizer.encode_batch(lines[first : first + LOT_LINES], add_special_tokens=False):
                encoding.ids  # noqa: B018  (to have the ids is the point)

    def ours() -> None:
        cores = len(os.sched_getaffinity(0))
        with tempfile.TemporaryDirectory() as folder:
            prepare([text], Path(folder) / "corpus", vocab=vocab, workers=cores, progress=False)

    times = [(seconds(ours), seconds(peer)) for _ in range(repeats)]
    return min(a for a, _ in times), min(b for _, b in times)


def _instances(corpus: Corpus, length: int, whole_words: bool, repeats: int) -> dict[str, Any]:
    split = corpus.split("train")
    instances = PretrainingInstances(split, length, seed=0, whole_word_masking=whole_words)
    table_s = seconds(lambda: instances.num_instances(0))
    indices = epoch_order(0, 0, instances.num_instances(0), 0, min(8192, instances.num_instances(0)))
    instances.batch(0, indices[:512])
    rate = len(indices) / min(seconds(lambda: instances.batch(0, indices)) for _ in range(repeats))
    documents = [[sentence.tolist() for sentence in split.document(index)] for index in range(20)]
    options = {"max_predictions": instances.max_predictions, "whole_word_masking": whole_words}
    start = time.perf_counter()
    made = len(reference_epoch(documents, split.vocabulary, length, seed=0, epoch=0, **options))
    reference = made / (time.perf_counter() - start)
    return {
        "benchmark": "instances, one thread",
        "name": f"length {length}{', whole words' if whole_words else ''}",
        "table_s": table_s,
        "per_s": rate,
        "reference_per_s": reference,
        "ratio": rate / reference,
    }
