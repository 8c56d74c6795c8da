"""The benchmark of the data path measures what it says, and preparing takes no more memory for more text.

Guards: a figure of memory that misses the workers, a loader whose cost is hidden, text held in memory as a whole.
"""

import json
import lzma
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import largebatch
from largebatch.bench import data, loader, memory
from largebatch.cli import main
from largebatch.data import prepare
from largebatch.errors import UserError

BOOKS = Path(largebatch.__file__).parent / "assets" / "demo_corpus" / "gutenberg.txt.xz"
TEXT = "\n\n".join(f"Document {i}. It has this sentence, and another one.\nAnd a paragraph." for i in range(400))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text(TEXT)
    prepare([folder / "text.txt"], folder / "corpus", vocab_size=100, workers=1, progress=False)
    return folder


def test_the_peak_is_that_of_all_processes_at_once() -> None:
    """A child that holds 80 MB beside a parent that holds as much; one after the other would be half of it."""
    child = "x = bytearray(80_000_000); import time; time.sleep(1)"
    together = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); {child}; p.wait()"
    peak = memory.peak_bytes([sys.executable, "-c", together])
    alone = memory.peak_bytes([sys.executable, "-c", child])
    if peak is None or alone is None:
        pytest.skip("this system does not tell the memory of a process")
    assert 160e6 < peak < 260e6
    assert 80e6 < alone < 130e6


def test_a_command_that_fails_is_not_measured() -> None:
    with pytest.raises(UserError, match="failed: too bad"):
        memory.peak_bytes([sys.executable, "-c", "raise SystemExit('too bad')"])


def test_the_grown_text_repeats_every_document_in_another_order(corpus: Path, tmp_path: Path) -> None:
    size = (corpus / "text.txt").stat().st_size
    text = memory.grown(corpus / "text.txt", tmp_path / "grown.txt", 3 * size).read_text()
    documents = [document.split("\n", 1) for document in text.strip().split("\n\n")]
    assert 3 * size <= len(text) < 3.1 * size
    first, second = ([body for head, body in documents if head == f"Copy number {copy}."] for copy in (1, 2))
    assert first != second
    assert sorted(first) == sorted(second) == sorted(TEXT.split("\n\n"))


def test_the_loader_runs_beside_training(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_TURN", 2)
    row = loader.bench_loader(corpus / "corpus", "tiny", steps=4, batch_size=2)
    assert row["instances_per_cpu_s"] > 0
    assert 0 <= row["wait_share"] < 1
    assert row["cpu_share"] > 0


def test_shares_are_of_the_step_and_both_sides_see_the_same_batches(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of 1.0 s with the loader, 0.1 s of it waiting, and 0.8 s without: shares of 10% and 25%."""
    seen: list[list[dict[str, int]]] = []

    class Clockwork:
        def __init__(self, model, optimizer, stages, batches, loss) -> None:
            self.batches, self.seconds = batches, 1.0 if not seen else 0.8
            seen.append([])
            self.seen = seen[-1]

        def run(self):
            for batch in self.batches(0, None):
                self.seen.append(batch.cursor)
                yield SimpleNamespace(step_s=self.seconds, data_s=0.1)

    monkeypatch.setattr(loader, "Engine", Clockwork)
    row = loader.bench_loader(corpus / "corpus", "tiny", steps=20, batch_size=2)
    assert row["wait_share"] == pytest.approx(0.1)
    assert row["cost_share"] == pytest.approx(0.25)
    assert row["step_ms"] == pytest.approx(1000)
    assert seen[0] == seen[1]
    assert len(seen[0]) == 30  # one turn of ten to warm up


def test_an_interpreter_that_does_not_run_is_one_line(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is found before anything is measured."""
    monkeypatch.setattr(data, "_preparing", lambda *_: pytest.fail("too late"))
    for python in (corpus / "text.txt", corpus):
        with pytest.raises(
            UserError, match=rf"{python} -m official\..*: failed: Permission denied; it needs tensorflow"
        ):
            data.bench_data(corpus / "text.txt", google=python, say=lambda line: None)


PREPARE = """
import sys
from pathlib import Path
import largebatch.data.prepare
from largebatch.data import blocks, prepare
from largebatch.data.sources import find_sources
blocks.BLOCK_BYTES = sys.modules["largebatch.data.prepare"].BLOCK_BYTES = 1 << 18
text, vocab, hold = sys.argv[1:]
held = list(blocks.read_blocks(find_sources([text]), "text")) if hold == "hold" else None
prepare([text], text + ".corpus", vocab=vocab, workers=1, progress=False)
"""


@pytest.mark.slow
def test_twice_the_text_takes_no_more_memory(corpus: Path, tmp_path: Path) -> None:
    """8 and 20 MB in blocks of 256 kB: what grows are the tables of documents and sentences, and the allocator's luck.

    The same measure sees it when the text is held: 12 MB more.
    """
    book = tmp_path / "book.txt"
    with lzma.open(BOOKS, "rt", encoding="utf-8") as file:
        book.write_text(file.read(4_000_000))
    peaks = {}
    for megabytes in (8, 20):
        text = memory.grown(book, tmp_path / f"{megabytes}.txt", megabytes * 10**6)
        for hold in ("no", "hold"):
            peaks[megabytes, hold] = memory.peak_bytes(
                [sys.executable, "-c", PREPARE, str(text), str(corpus / "corpus" / "vocab.txt"), hold]
            )
            shutil.rmtree(f"{text}.corpus")
    if None in peaks.values():
        pytest.skip("this system does not tell the memory of a process")
    assert peaks[20, "no"] - peaks[8, "no"] < 6e6, peaks
    assert peaks[20, "hold"] - peaks[8, "hold"] > 9e6, peaks


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    assert main(["bench", "data", "tiny", "--rounds", "1", "--grow-to", "20", "--out", str(tmp_path / "d.json")]) == 0
    rows = json.loads((tmp_path / "d.json").read_text())["figures"]
    named = {row["name"]: row for row in rows}
    assert named["tokenizers encode_batch"]["ratio"] == 1
    assert named["largebatch prepare"]["tokens_per_s"] > 0
    assert named["largebatch prepare and its workers"]["megabytes"] >= 20
    assert named["length 128"]["ratio"] > 10
    assert 0 <= named["bert-tiny"]["wait_share"] < 1
