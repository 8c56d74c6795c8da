"""The text path against its peers, on the same text and cores, in one run.

    python -m benchmarks.data_pipeline [TEXT] [--vocab vocab.txt] [--repeats 3]

Preparing (reading, sentences, word pieces, duplicates, shards, checksums, report) stands beside the bare `encode_batch`
of `tokenizers`, which uses all cores too. The instances stand beside the token-by-token reference. TEXT is a plain text
file; without it the shipped corpus is used. Runs alternate; the fastest of each counts.
"""

import argparse
import lzma
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import largebatch
from largebatch.data import Corpus, PretrainingInstances, epoch_order, prepare
from largebatch.data.reference_instances import reference_epoch

DEMO_TEXT = Path(largebatch.__file__).parent / "assets" / "demo_corpus" / "gutenberg.txt.xz"
LOT_LINES = 20_000


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def preparing(text: Path, vocab: Path, repeats: int) -> tuple[float, float]:
    """Seconds for `prepare` with a given vocabulary, and for `encode_batch` over the lines of the text."""
    from tokenizers import BertWordPieceTokenizer

    tokenizer = BertWordPieceTokenizer(str(vocab))._tokenizer
    lines = text.read_text(encoding="utf-8").split("\n")
    cores = len(os.sched_getaffinity(0))

    def peer() -> None:
        for first in range(0, len(lines), LOT_LINES):
            for encoding in tokenizer.encode_batch(lines[first : first + LOT_LINES], add_special_tokens=False):
                encoding.ids  # noqa: B018  (to have the ids is the point)

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            prepare([text], Path(folder) / "corpus", vocab=vocab, workers=cores, progress=False)

    times = [(seconds(ours), seconds(peer)) for _ in range(repeats)]
    return min(a for a, _ in times), min(b for _, b in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", type=Path)
    parser.add_argument("--vocab", type=Path, help="without it, one of 8,192 pieces is trained first")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        text = arguments.text or Path(folder) / "text.txt"
        if arguments.text is None:
            text.write_bytes(lzma.decompress(DEMO_TEXT.read_bytes()))
        num_megabytes = text.stat().st_size / 1e6
        corpus_path = Path(folder) / "corpus"
        whole_s = seconds(lambda: prepare([text], corpus_path, vocab=arguments.vocab, vocab_size=8192))
        vocab = arguments.vocab or corpus_path / "vocab.txt"
        corpus = Corpus.open(corpus_path)
        verify_s = seconds(lambda: Corpus.open(corpus_path))
        print(f"text: {num_megabytes:.1f} MB, {corpus.manifest.report['tokens']:,} tokens; {os.cpu_count()} cores")
        print("| preparing | s | MB/s |\n|---|---|---|")
        trained = "given" if arguments.vocab else "trained"
        print(f"| prepare, vocabulary {trained} (once) | {whole_s:.1f} | {num_megabytes / whole_s:.1f} |")
        ours, peer = preparing(text, vocab, arguments.repeats)
        print(f"| prepare, vocabulary given | {ours:.1f} | {num_megabytes / ours:.1f} |")
        print(f"| tokenizers `encode_batch` alone | {peer:.1f} | {num_megabytes / peer:.1f} |")
        print(f"| opening with all checksums | {verify_s:.2f} | |")

        split = corpus.split("train")
        documents = [[sentence.tolist() for sentence in split.document(index)] for index in range(20)]
        print("\n| instances, one thread | epoch's table, s | per s | reference per s | ratio |\n|---|---|---|---|---|")
        for length in (128, 512):
            for whole_words in (False, True):
                instances = PretrainingInstances(split, length, seed=0, whole_word_masking=whole_words)
                table_s = seconds(lambda instances=instances: instances.num_instances(0))
                indices = epoch_order(0, 0, instances.num_instances(0), 0, min(8192, instances.num_instances(0)))
                instances.batch(0, indices[:512])
                best = min(
                    seconds(lambda instances=instances, indices=indices: instances.batch(0, indices))
                    for _ in range(arguments.repeats)
                )
                options = {"max_predictions": instances.max_predictions, "whole_word_masking": whole_words}
                start = time.perf_counter()
                num_reference = len(reference_epoch(documents, split.vocabulary, length, seed=0, epoch=0, **options))
                reference = num_reference / (time.perf_counter() - start)
                rate = len(indices) / best
                name = f"length {length}{', whole words' if whole_words else ''}"
                print(f"| {name} | {table_s:.2f} | {rate:,.0f} | {reference:,.0f} | {rate / reference:.0f} |")
        order_s = seconds(lambda: epoch_order(0, 0, 10**8, 5 * 10**7, 5 * 10**7 + 8192))
        print(f"\n8,192 indices out of the shuffle of 1e8: {1e3 * order_s:.1f} ms")
        print(f"peak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB")


if __name__ == "__main__":
    main()
