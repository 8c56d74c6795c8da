"""`largebatch bench data`: preparing text beside the bare tokenizer, making instances, and what they cost training."""

import lzma
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from largebatch.data import Corpus, prepare

from .bert import TEXT
from .google import bench_google
from .loader import bench_instances, bench_loader
from .memory import prepare_memory

_LOT_LINES = 20_000
Rows = list[dict[str, Any]]


def bench_data(
    text: Path | None = None,
    vocab: Path | None = None,
    *,
    repeats: int = 3,
    sizes: Sequence[str] = ("tiny", "mini"),
    grow_to: int = 0,
    google: Path | None = None,
    say: Callable[[str], None] = print,
) -> Rows:
    """Measure the way from text to the training loop.

    1. Google's script from text to instances, if it is at hand: first, as an interpreter may lack what it needs.
    2. Preparing (reading, sentences, word pieces, duplicates, shards, checksums, report) on all cores, in turns with
       `encode_batch` of `tokenizers`, which uses all cores too and does nothing else.
    3. The memory of preparing.
    4. Instances of one core, beside a reference that makes them token by token.
    5. Training with the loader beside it, and on batches made beforehand.

    Args:
        text: a plain text file; the shipped corpus without it.
        vocab: a vocab.txt; without it one of 8,192 pieces is trained first.
        repeats: how often preparing and making instances are run; medians are told.
        sizes: of the BERTs to train.
        grow_to: bytes to which the text is repeated, its documents shuffled, to show the memory of preparing.
        google: see `bench_google`.
        say: told what is measured now.
    """
    with tempfile.TemporaryDirectory() as folder:
        if text is None:
            text = Path(folder) / "text.txt"
            text.write_bytes(lzma.decompress((TEXT / "gutenberg.txt.xz").read_bytes()))
        corpus_path = Path(folder) / "corpus"
        prepare([text], corpus_path, vocab=vocab, vocab_size=8192, progress=False)
        corpus = Corpus.open(corpus_path)
        vocab = vocab or corpus_path / "vocab.txt"
        rows: Rows = []
        if google is not None:
            say("create_pretraining_data.py")
            rows += bench_google(google, text, vocab)
        say("preparing")
        rows += _preparing(text, vocab, corpus.manifest.report["tokens"], repeats)
        say("its memory")
        rows.append(prepare_memory(text, vocab, grow_to))
        say("instances")
        rows += [bench_instances(corpus, length, whole, repeats) for length in (128, 512) for whole in (False, True)]
        for size in sizes:
            say(f"training bert-{size}")
            rows.append(bench_loader(corpus_path, size))
        return rows


def _preparing(text: Path, vocab: Path, num_tokens: int, repeats: int) -> Rows:
    from tokenizers import BertWordPieceTokenizer

    tokenizer = BertWordPieceTokenizer(str(vocab))._tokenizer
    lines = text.read_text(encoding="utf-8").split("\n")
    cores = len(os.sched_getaffinity(0))

    def encode(encode_batch: Callable[..., list[Any]]) -> None:
        for first in range(0, len(lines), _LOT_LINES):
            for encoding in encode_batch(lines[first : first + _LOT_LINES], add_special_tokens=False):
                encoding.ids  # noqa: B018  (to have the ids is the point)

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            prepare([text], Path(folder) / "corpus", vocab=vocab, workers=cores, progress=False)

    contenders: dict[str, Callable[[], None]] = {
        "largebatch prepare": ours,
        "tokenizers encode_batch": lambda: encode(tokenizer.encode_batch),
        "tokenizers encode_batch_fast": lambda: encode(tokenizer.encode_batch_fast),
    }
    wall: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, work in contenders.items():
            cpu_before, before = _cpu_s(), time.perf_counter()
            work()
            wall[name].append(time.perf_counter() - before)
            cpu[name].append(_cpu_s() - cpu_before)
    megabytes = text.stat().st_size / 1e6
    unit = statistics.median(wall["tokenizers encode_batch"])
    rows = []
    for name in contenders:
        seconds = statistics.median(wall[name])
        rows.append(
            {
                "benchmark": "preparing",
                "name": name,
                "megabytes": megabytes,
                "tokens": num_tokens,
                "cores": cores,
                "s": seconds,
                "mb_per_s": megabytes / seconds,
                "tokens_per_s": num_tokens / seconds,
                "mb_per_cpu_s": megabytes / statistics.median(cpu[name]),
                "ratio": seconds / unit,
            }
        )
    return rows


def _cpu_s() -> float:
    """CPU time so far, of this process and of those of its children that have ended."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in both)
