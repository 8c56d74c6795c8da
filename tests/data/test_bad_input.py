"""Every mistake a user can make with the input is one clear line, and leaves nothing behind but finished blocks.

Guards: silent skipping of a bad line or file, tracebacks, half-written corpora.
"""

import bz2
import errno
import gzip
import io
import json
import lzma
import os
from pathlib import Path

import pytest

from largebatch.data import prepare
from largebatch.data.vocabulary import SPECIAL_TOKENS
from largebatch.errors import UserError

GOOD = b"One sentence. Another.\n\nA second document.\n"


@pytest.fixture
def vocab(tmp_path: Path) -> Path:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*SPECIAL_TOKENS, "one", "sentence", ".", "another", "a"]) + "\n")
    return path


def json_lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


CASES: dict[str, tuple[str, bytes | None, str]] = {
    "missing": ("nothing.txt", None, r"nothing.txt: there is no such file or directory"),
    "empty": ("a.txt", b"", r"a.txt: the file is empty; remove it from the inputs"),
    "empty within gzip": ("a.txt.gz", gzip.compress(b""), r"a.txt.gz: the file is empty"),
    "latin-1": (
        "a.txt",
        GOOD + b"caf\xe9 au lait\n",
        r"a.txt, line 4: not UTF-8 at byte 46 \(0xe9\); convert the file, for example with `iconv -t UTF-8`",
    ),
    "utf-16": ("a.txt", GOOD.decode().encode("utf-16"), r"a.txt, line 1: not UTF-8 at byte 0"),
    "utf-16 without a mark": (
        "a.txt",
        GOOD.decode().encode("utf-16-le"),
        r"a.txt: full of NUL bytes, as UTF-16 is; convert the file with `iconv -f UTF-16LE -t UTF-8`",
    ),
    "name too long": ("a" * 260, None, "aaa: cannot be read: File name too long"),
    "cut in a character": ("a.txt", "naïve é".encode()[:-1], r"a.txt, line 1: not UTF-8 at byte 7"),
    "binary": ("a.txt", bytes(range(256)), r"a.txt, line 2: not UTF-8 at byte 128"),
    "json without the field": (
        "a.jsonl",
        json_lines({"text": "One."}) + b"\n" + json_lines({"body": "x", "id": 3}),
        r"a.jsonl, line 3: no field 'text' \(fields: body, id\); name the text field",
    ),
    "json of an empty object": ("a.jsonl", b"{}\n", r"a.jsonl, line 1: no field 'text' \(fields: none\)"),
    "json field of numbers": ("a.jsonl", json_lines({"text": 3}), r"line 1: field 'text' holds a JSON int, not text"),
    "json of another kind": ("a.jsonl", b'"text"\n', r"a.jsonl, line 1: holds a JSON str, not an object"),
    "json nested too deeply": (
        "a.jsonl",
        b"\n" + b"[" * 200_000,
        r"a.jsonl, line 2: JSON nested too deeply to be read",
    ),
    "json array": ("a.json", b'[\n{"text": "a"}\n]\n', r"a.json, line 1: not JSON .*; a JSON array is not JSON lines"),
    "json cut short": ("a.jsonl", json_lines({"text": "One."}) + b'{"text": "b', r"a.jsonl, line 2: not JSON"),
    "json not utf-8": ("a.jsonl", b'{"text": "caf\xe9"}\n', r"a.jsonl, line 1: not UTF-8 at byte 13"),
    "gzip cut short": ("a.txt.gz", gzip.compress(GOOD * 99)[:-9], r"a.txt.gz: damaged or not a .gz file"),
    "not gzip": ("a.txt.gz", GOOD, r"a.txt.gz: damaged or not a .gz file \(Not a gzipped file"),
    "gzip damaged": (
        "a.txt.gz",
        gzip.compress(GOOD)[:-6] + b"\xff" + gzip.compress(GOOD)[-5:],
        r"a.txt.gz: damaged or not a .gz file",
    ),
    "xz cut short": ("a.txt.xz", lzma.compress(GOOD * 99)[:-9], r"a.txt.xz: damaged or not a .xz file"),
    "not xz": ("a.txt.xz", GOOD, r"a.txt.xz: damaged or not a .xz file"),
    "bz2 cut short": ("a.txt.bz2", bz2.compress(GOOD * 99)[:-9], r"a.txt.bz2: damaged or not a .bz2 file"),
    "not bz2": ("a.txt.bz2", GOOD, r"a.txt.bz2: damaged or not a .bz2 file"),
    "not parquet": ("a.parquet", GOOD * 9, r"a.parquet: damaged or not a Parquet file"),
    "parquet within gzip": ("a.parquet.gz", GOOD, r"a.parquet.gz: Parquet is compressed inside"),
    "zstandard": ("a.txt.zst", GOOD, r"a.txt.zst: zstandard is not read; decompress it with `unzstd`"),
}


# The code is the same in a worker process: three cases suffice there.
IN_WORKERS = ("latin-1", "json without the field", "xz cut short")


@pytest.mark.parametrize(("case", "workers"), [*((case, 1) for case in CASES), *((case, 2) for case in IN_WORKERS)])
def test_bad_files(tmp_path, vocab, case: str, workers: int) -> None:
    name, content, message = CASES[case]
    good = tmp_path / "good.txt"
    good.write_bytes(GOOD)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message) as caught:
        prepare([good, tmp_path / name], tmp_path / "out", vocab=vocab, workers=workers)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_no_document_is_left(tmp_path, vocab) -> None:
    (tmp_path / "blank.txt").write_bytes(b"\n \n\n")
    (tmp_path / "good.txt").write_bytes(GOOD)
    with pytest.raises(UserError, match="no document in the input: every one is empty"):
        prepare([tmp_path / "blank.txt"], tmp_path / "out", vocab=vocab)
    with pytest.raises(UserError, match="no document is left to train on"):
        prepare([tmp_path / "good.txt"], tmp_path / "out", vocab=vocab, heldout=0.9999999)
    assert not (tmp_path / "out").exists()


def test_line_and_byte_are_right_beyond_the_first_block(tmp_path, vocab, monkeypatch) -> None:
    import sys

    monkeypatch.setattr(sys.modules["largebatch.data.blocks"], "BLOCK_BYTES", 1000)
    good = GOOD * 200
    (tmp_path / "a.txt").write_bytes(good + b"caf\xe9\n" + good)
    line, byte = good.count(b"\n") + 1, len(good) + 3
    with pytest.raises(UserError, match=rf"a.txt, line {line}: not UTF-8 at byte {byte} "):
        prepare([tmp_path / "a.txt"], tmp_path / "out", vocab=vocab)
    rows = json_lines({"text": "One."}) * 300
    (tmp_path / "a.jsonl").write_bytes(rows + b"{}\n" + rows)
    with pytest.raises(UserError, match=r"a.jsonl, line 301: no field"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", vocab=vocab)


def test_a_json_line_longer_than_any_document(tmp_path, vocab, monkeypatch) -> None:
    import sys

    sources = sys.modules["largebatch.data.blocks"]
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 1 << 20)
    (tmp_path / "a.jsonl").write_bytes(json_lines({"text": "One."}) + json_lines({"text": "x" * (2 << 20)}))
    with pytest.raises(UserError, match=r"a.jsonl, line 2: longer than 1 MiB"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", vocab=vocab)


def test_bad_tables(tmp_path, vocab) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet: no column 'text'; there are body, n; name one as the text field"):
        prepare([tmp_path / "a.parquet"], tmp_path / "out", vocab=vocab)
    with pytest.raises(UserError, match=r"a.parquet: column 'n' holds int64, not text"):
        prepare([tmp_path / "a.parquet"], tmp_path / "out", vocab=vocab, text_field="n")
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "twice.parquet")
    with pytest.raises(UserError, match=r"twice.parquet: 2 columns are named 'text'; give each a name of its own"):
        prepare([tmp_path / "twice.parquet"], tmp_path / "out", vocab=vocab)
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a.parquet: damaged or not a Parquet file"):
        prepare([tmp_path / "a.parquet"], tmp_path / "out", vocab=vocab)
    rows = pa.array([b"good"] * 600 + [b"caf\xe9"], pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": rows}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b.parquet, rows 513 to 1024: column 'text' holds what is not UTF-8 \(0xe9\)"):
        prepare([tmp_path / "b.parquet"], tmp_path / "out", vocab=vocab)


def test_bad_vocabularies_and_settings(tmp_path, vocab) -> None:
    good = tmp_path / "good.txt"
    good.write_bytes(GOOD)
    (tmp_path / "no_mask.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n")
    (tmp_path / "folder").mkdir()
    for options, message in (
        ({"vocab": tmp_path / "no_mask.txt"}, r"no_mask.txt: lacks \[MASK\]"),
        ({"vocab": tmp_path / "none.txt"}, "none.txt: there is no such vocabulary file"),
        ({"vocab": tmp_path / "folder"}, "vocab.txt: there is no such vocabulary file"),
        ({"vocab_size": 10}, "a vocabulary of 10 is too small"),
        ({"vocab": vocab, "heldout": 1.0}, r"the held-out share must lie in \[0, 1\), got 1.0"),
        ({"vocab": vocab, "heldout": -0.1}, "got -0.1"),
        ({"vocab": vocab, "workers": 0}, "workers must be at least 1, got 0"),
    ):
        with pytest.raises(UserError, match=message):
            prepare([good], tmp_path / "out", **options)
    with pytest.raises(UserError, match="name a directory to make"):
        prepare([good], ".", vocab=vocab)
    with pytest.raises(UserError, match="no input given"):
        prepare([], tmp_path / "out", vocab=vocab)
    with pytest.raises(UserError, match=r"folder: no .txt, .*file .* in this directory"):
        prepare([tmp_path / "folder"], tmp_path / "out", vocab=vocab)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_library_that_is_not_installed_is_named(tmp_path, vocab, monkeypatch) -> None:
    import sys

    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"reading Parquet needs pyarrow; install largebatch\[data\]"):
        prepare([tmp_path / "a.parquet"], tmp_path / "out", vocab=vocab)
    with pytest.raises(UserError, match=r"reading Hugging Face data sets needs `datasets`; install largebatch\[data\]"):
        prepare(["hf:x"], tmp_path / "out", vocab=vocab)


def test_an_unreadable_input_and_an_unwritable_output(tmp_path, vocab) -> None:
    good = tmp_path / "good.txt"
    good.write_bytes(GOOD)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be made: Not a directory"):
        prepare([good], tmp_path / "file" / "out", vocab=vocab)
    with pytest.raises(UserError, match="cannot be made: File name too long"):
        prepare([good], tmp_path / ("a" * 260), vocab=vocab)
    with pytest.raises(UserError, match="aaa: cannot be read: File name too long"):
        prepare([good], tmp_path / "out", vocab=tmp_path / ("a" * 260))


def test_what_may_not_be_read(folder_of_nobody) -> None:
    folder = folder_of_nobody
    texts = folder / "texts"
    (texts / "locked").mkdir(parents=True)
    for path in (folder / "vocab.txt", texts / "locked" / "vocab.txt"):
        path.write_text("\n".join([*SPECIAL_TOKENS, "one", "sentence", ".", "another", "a"]) + "\n")
    for path in (texts / "good.txt", texts / "closed.txt", texts / "locked" / "good.txt"):
        path.write_bytes(GOOD)
    (texts / "closed.txt").chmod(0)
    (texts / "locked").chmod(0)
    vocab, out = folder / "vocab.txt", folder / "out"
    for given, message in (
        (texts / "closed.txt", "closed.txt: cannot be read: Permission denied"),
        (texts / "locked" / "good.txt", "good.txt: cannot be read: Permission denied"),
        (texts / "locked", "locked: cannot be read: Permission denied; change that or move it out of the input"),
        (texts, "locked: cannot be read: Permission denied; change that or move it out of the input"),
    ):
        with pytest.raises(UserError, match=message):
            prepare([given], out, vocab=vocab)
    with pytest.raises(UserError, match=r"vocab.txt: cannot be read: Permission denied"):
        prepare([texts / "good.txt"], out, vocab=texts / "locked" / "vocab.txt")
    for name in ("out", "deeper/out"):
        with pytest.raises(UserError, match=r"out.partial: cannot be made: Permission denied"):
            prepare([texts / "good.txt"], texts / "locked" / name, vocab=vocab)
    (texts / ".hidden").mkdir(mode=0)  # which is no input
    (texts / "locked").chmod(0o700)
    (texts / "closed.txt").chmod(0o600)
    manifest = prepare([texts], out, vocab=vocab)
    assert [entry["name"] for entry in manifest.inputs] == [
        "texts/closed.txt", "texts/good.txt", "texts/locked/good.txt", "texts/locked/vocab.txt",
    ]  # fmt: skip


def test_a_pipe_is_no_file(tmp_path, vocab) -> None:
    """Nor is what the shell gives for `<(zcat ...)`; and it would be waited for."""
    (tmp_path / "good.txt").write_bytes(GOOD)
    os.mkfifo(tmp_path / "pipe.txt")
    for given in (tmp_path / "pipe.txt", tmp_path):
        with pytest.raises(UserError, match=r"pipe.txt: a pipe or a device, and the input is read more than once"):
            prepare([given], tmp_path / "out", vocab=vocab)


class FullDisk(io.BufferedWriter):
    """Takes little; numpy, which writes past it, sees none of what it says, and no number of a real disk's error."""

    def write(self, data) -> int:
        if memoryview(data).nbytes > 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def test_a_full_disk_is_named_and_the_work_kept(tmp_path, vocab, monkeypatch) -> None:
    (tmp_path / "good.txt").write_bytes(GOOD * 999)
    real = Path.open

    def on_a_full_disk(self: Path, mode: str = "r", **options):
        return FullDisk(io.FileIO(self, mode)) if mode == "wb" else real(self, mode, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", on_a_full_disk)
        with pytest.raises(UserError, match=r"out: No space left on device; once that is mended, the same command"):
            prepare([tmp_path / "good.txt"], tmp_path / "out", vocab=vocab)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").exists()
    assert not list((tmp_path / "out.partial").glob("blocks-*/*"))
    prepare([tmp_path / "good.txt"], tmp_path / "out", vocab=vocab)
    assert not (tmp_path / "out.partial").exists()
