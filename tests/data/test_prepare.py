"""Preparing a corpus: every input kind, the same bytes however it is run, and continuing after a kill.

Guards: the data set is the one part of a run nobody looks at; a lost document, a token shifted by one or an output
that depends on the number of workers would be seen by no loss curve.
"""

import bz2
import contextlib
import gzip
import hashlib
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import largebatch.data.prepare  # noqa: F401  (the module, behind the function of that name)
from largebatch.data import Corpus, Manifest, prepare, prepare_part, render_report
from largebatch.data.sentences import split_sentences
from largebatch.data.wordpiece import plain_tokenizer
from largebatch.errors import UserError

DOCUMENTS = [
    ["The cat sat. The dog ran!", "A second paragraph of it."],
    ["Only one sentence here"],
    ["Numbers 1, 2 and 3. Done.", "Más acentos: é, ü. Sí.", "Third."],
    *[[f"Document number {i} says so. It has two sentences."] for i in range(40)],
]


@pytest.fixture(scope="module")
def vocab(tmp_path_factory, demo_paragraphs) -> Path:
    from largebatch.data.wordpiece import train_vocabulary

    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(train_vocabulary(demo_paragraphs[:800], 1000, lowercase=True).tokens) + "\n")
    return path


def digests(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def write_text(path: Path, documents: list[list[str]], newline: str = "\n") -> Path:
    text = (newline * 2).join(newline.join(document) for document in documents) + newline
    path.write_bytes(text.encode())
    return path


def read_back(directory: Path) -> list[str]:
    """All documents of a corpus as text of pieces, in order within each split."""
    corpus = Corpus.open(directory)
    return [
        " / ".join(" ".join(corpus.vocabulary.tokens[token] for token in sentence) for sentence in document)
        for name, content in corpus.manifest.splits.items()
        if content["documents"]
        for document in corpus.split(name)
    ]


def expected_documents(vocab: Path, documents: list[list[str]]) -> list[str]:
    from largebatch.data import Vocabulary

    tokenizer = plain_tokenizer(Vocabulary.read(vocab), lowercase=True)
    return [
        " / ".join(
            " ".join(tokenizer.encode(sentence, add_special_tokens=False).tokens)
            for paragraph in document
            for sentence in split_sentences(paragraph)
        )
        for document in documents
    ]


def test_documents_arrive_whole_and_in_order(tmp_path, vocab) -> None:
    source = write_text(tmp_path / "a.txt", DOCUMENTS)
    manifest = prepare([source], tmp_path / "out", vocab=vocab, heldout=0.0)
    assert read_back(tmp_path / "out") == expected_documents(vocab, DOCUMENTS)
    assert manifest.report["documents"] == {
        "read": 43, "train": 43, "heldout": 0, "empty": 0, "duplicate": 0, "cut": 0,
    }  # fmt: skip
    assert not (tmp_path / "out.partial").exists()


def test_every_kind_of_input_gives_the_same_corpus(tmp_path, vocab) -> None:
    """Text with Unix and Windows line ends, a byte-order mark, or more blank lines; JSON lines; Parquet; compressed."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    texts = ["\n".join(document) for document in DOCUMENTS]
    plain = write_text(tmp_path / "plain.txt", DOCUMENTS)
    write_text(tmp_path / "windows.txt", DOCUMENTS, "\r\n")
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf" + plain.read_bytes())
    (tmp_path / "blank.txt").write_bytes(b"\n \n" + plain.read_bytes().replace(b"\n\n", b"\n\t \n\n") + b"\n\n")
    (tmp_path / "no_suffix").write_bytes(plain.read_bytes())
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts))
    (tmp_path / "lines.json").write_text("\n\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in texts))
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), tmp_path / "table.parquet")
    pq.write_table(
        pa.table({"text": pa.array(texts, pa.large_string())}), tmp_path / "groups.parquet", row_group_size=7
    )
    for module, suffix in ((gzip, ".gz"), (bz2, ".bz2"), (lzma, ".xz")):
        (tmp_path / f"plain.txt{suffix}").write_bytes(module.compress(plain.read_bytes()))
        (tmp_path / f"lines.jsonl{suffix}").write_bytes(module.compress((tmp_path / "lines.jsonl").read_bytes()))
    sources = sorted(path for path in tmp_path.iterdir() if path.is_file())
    assert len(sources) == 15
    expected = expected_documents(vocab, DOCUMENTS)
    for number, source in enumerate(sources):
        out = tmp_path / f"out{number}"
        prepare([source], out, vocab=vocab, heldout=0.0)
        assert read_back(out) == expected, source.name


def test_a_directory_is_read_in_order_of_names_without_what_is_not_text(tmp_path, vocab) -> None:
    folder = tmp_path / "folder"
    (folder / "b").mkdir(parents=True)
    write_text(folder / "b" / "2.txt", DOCUMENTS[10:])
    write_text(folder / "a.txt", DOCUMENTS[:5])
    (folder / "b" / "1.jsonl").write_text("".join(json.dumps({"text": "\n".join(d)}) + "\n" for d in DOCUMENTS[5:10]))
    (folder / "LICENSE").write_text("not this")
    (folder / "picture.png").write_bytes(b"\x89PNG\xff")
    (folder / ".hidden.txt").write_text("nor this")
    (folder / "empty.txt").write_bytes(b"")
    manifest = prepare([folder], tmp_path / "out", vocab=vocab, heldout=0.0)
    assert read_back(tmp_path / "out") == expected_documents(vocab, DOCUMENTS)
    assert [entry["name"] for entry in manifest.inputs] == [
        "folder/a.txt", "folder/b/1.jsonl", "folder/b/2.txt", "folder/empty.txt",
    ]  # fmt: skip


def test_what_is_made_is_not_read(tmp_path, vocab, monkeypatch) -> None:
    """The output inside the input, by way of a link or not: neither the work in progress nor the corpus is text."""
    write_text(tmp_path / "a.txt", DOCUMENTS)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "linked")
    for given, out in ((".", "corpus"), (tmp_path, "second"), (tmp_path, "link")):
        for part in ((1, 2), (2, 2)):
            prepare_part([given], out, part, vocab_size=300, progress=False)
        manifest = prepare([given], out, vocab_size=300)
        assert [entry["name"].split("/")[-1] for entry in manifest.inputs] == ["a.txt"]
        assert prepare([given], out, vocab_size=300) == manifest
        (Path(out) / "vocab.txt").rename(tmp_path / "vocab")
        shutil.rmtree(tmp_path / Path(out).resolve().name)
    with pytest.raises(UserError, match="not empty and not a corpus"):
        prepare([tmp_path], tmp_path, vocab=vocab)


def test_what_others_made_is_not_read(tmp_path, vocab, monkeypatch) -> None:
    """Corpora lie beside the text, finished or not; a folder of a like name, or one with a manifest, is text."""
    text = write_text(tmp_path / "a.txt", DOCUMENTS)
    prepare([text], tmp_path / "finished", vocab=vocab)
    prepare_part([text], tmp_path / "begun", (1, 1), vocab=vocab)
    (tmp_path / "begun.partial" / "lock").unlink()  # as of blocks that were copied from another machine
    for folder in ("mine.partial", "listed"):
        (tmp_path / folder).mkdir()
        write_text(tmp_path / folder / "b.txt", [[f"Of {folder}."]])
    (tmp_path / "listed" / "manifest.json").write_text('{"text": "A manifest."}')
    manifest = prepare([tmp_path], tmp_path / "out", vocab=vocab)
    assert [entry["name"].split("/", 1)[1] for entry in manifest.inputs] == [
        "a.txt", "listed/b.txt", "listed/manifest.json", "mine.partial/b.txt",
    ]  # fmt: skip
    for folder in ("finished", "begun.partial"):
        with pytest.raises(UserError, match=f"{folder}: made by `largebatch prepare`, not text; name what it was made"):
            prepare([tmp_path / folder], tmp_path / "bad", vocab=vocab)


def test_linked_directories_are_read_once(tmp_path) -> None:
    from largebatch.data.sources import find_sources

    for folder in ("in/own", "elsewhere/deep"):
        (tmp_path / folder).mkdir(parents=True)
        write_text(tmp_path / folder / "x.txt", DOCUMENTS)
    for name, target in {
        "in/a": "in/own",  # read by its own name
        "in/b": "elsewhere",
        "in/c": "elsewhere",  # once
        "in/own/up": "in",
        "in/own/higher": ".",
        "elsewhere/back": "in",
        "in/.hidden": "elsewhere",
    }.items():
        (tmp_path / name).symlink_to(tmp_path / target)
    (tmp_path / "in/linked.txt").symlink_to(tmp_path / "in/own/x.txt")
    (tmp_path / "in/nothing").symlink_to(tmp_path / "nothing")
    names = [source.name for source in find_sources(tmp_path / "in")]
    assert names == ["in/b/deep/x.txt", "in/linked.txt", "in/own/x.txt"]
    (tmp_path / "elsewhere/nothing.txt").symlink_to(tmp_path / "nothing.txt")
    with pytest.raises(UserError, match=r"in/b/nothing.txt: a link to a file that is not there$"):
        find_sources(tmp_path / "in")


def test_a_file_name_that_is_not_text(tmp_path, vocab) -> None:
    try:
        source = write_text(tmp_path / os.fsdecode(b"caf\xe9.txt"), DOCUMENTS)
    except OSError:
        pytest.skip("this file system wants names to be UTF-8")
    manifest = prepare(source, tmp_path / "out", vocab=vocab)
    assert manifest.inputs[0]["name"] == r"caf\xe9.txt"
    assert prepare(str(source), tmp_path / "out", vocab=vocab) == Manifest.read(tmp_path / "out") == manifest


def test_hugging_face_data_sets(tmp_path, vocab, monkeypatch) -> None:
    """A saved data set, a saved dictionary of splits, and a directory of files through the loader, without a net."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    datasets = pytest.importorskip("datasets")
    texts = ["\n".join(document) for document in DOCUMENTS]
    rows = datasets.Dataset.from_dict({"id": list(range(len(texts))), "text": texts})
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": rows, "validation": rows.select(range(3))}).save_to_disk(tmp_path / "splits")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    expected = expected_documents(vocab, DOCUMENTS)
    counts = {"saved": 43, "splits": 43, "splits:train": 43, "splits:validation": 3, "files": 43, "files::train": 43}
    for number, (name, count) in enumerate(counts.items()):
        out = tmp_path / f"out{number}"
        prepare([f"hf:{tmp_path / name}"], out, vocab=vocab, heldout=0.0)
        assert read_back(out) == expected[:count], name
    with pytest.raises(UserError, match="no column 'body'; there are"):
        prepare([f"hf:{tmp_path / 'saved'}"], tmp_path / "bad", vocab=vocab, text_field="body")
    for name, message in {
        "splits::nosuch": "cannot be loaded: 'nosuch'",
        "splits:train[:50%]": r"cannot be loaded: 'train\[:50%\]'",
        "splits:other": "has no configurations; a split of it is hf:.*splits::other",
        "saved:validation": "was saved without splits; name it as hf:.*saved$",
        "saved:other:": "has no configurations",
        "files:train[:50%]": r"cannot be loaded: .*train\[:50%\]",
    }.items():
        with pytest.raises(UserError, match=message):
            prepare([f"hf:{tmp_path / name}"], tmp_path / "bad", vocab=vocab)
    with pytest.raises(UserError, match="is named hf:NAME"):
        prepare(["hf:a:b:c:d"], tmp_path / "bad", vocab=vocab)
    assert not (tmp_path / "bad").exists()


def test_a_data_set_of_files_with_others_beside_them(tmp_path, vocab, monkeypatch) -> None:
    """What is no data does not count; a line that is no JSON is the user's to mend."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    pytest.importorskip("datasets")
    folder = tmp_path / "files"
    folder.mkdir()
    lines = "".join(json.dumps({"text": "\n".join(document)}) + "\n" for document in DOCUMENTS)
    (folder / "data.jsonl").write_text(lines)
    manifest = prepare(f"hf:{folder}", tmp_path / "out", vocab=vocab, heldout=0.0)
    (folder / "stats.png").write_bytes(b"\x89PNG")
    (folder / "notes.txt").write_text("not this")
    assert prepare(f"hf:{folder}", tmp_path / "out", vocab=vocab, heldout=0.0) == manifest
    (folder / "data.jsonl").write_text(lines + '{"text": "cut sho\n')
    with pytest.raises(UserError, match=r"files: damaged, or out of reach: .*JSON") as caught:
        prepare(f"hf:{folder}", tmp_path / "bad", vocab=vocab)
    assert "\n" not in str(caught.value)


def test_a_changed_data_set_is_another_input(tmp_path, vocab, monkeypatch) -> None:
    """A saved data set by its own fingerprint, one of files by the files' content and not by their age."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    datasets = pytest.importorskip("datasets")

    def write(words: list[str]) -> None:
        shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        datasets.Dataset.from_dict({"text": words}).save_to_disk(tmp_path / "saved")
        (tmp_path / "files").mkdir(exist_ok=True)
        file = tmp_path / "files" / "train.jsonl"
        file.write_text("".join(json.dumps({"text": word}) + "\n" for word in words))
        os.utime(file, (len(stamps), len(stamps)))
        stamps.append(words)

    stamps: list[list[str]] = []
    write(["The cat.", "A dog."])
    made = {
        name: prepare(f"hf:{tmp_path / name}", tmp_path / f"{name}.out", vocab=vocab) for name in ("saved", "files")
    }
    write(["The cat.", "A dog."])
    for name, manifest in made.items():
        assert prepare([f"hf:{tmp_path / name}"], tmp_path / f"{name}.out", vocab=vocab) == manifest
    write(["The cat.", "A cow."])
    for name in made:
        with pytest.raises(UserError, match="already holds a corpus of other inputs"):
            prepare([f"hf:{tmp_path / name}"], tmp_path / f"{name}.out", vocab=vocab)


def test_the_vocabulary_comes_from_all_of_a_data_set(tmp_path, monkeypatch, small_blocks) -> None:
    datasets = pytest.importorskip("datasets")
    texts = ["The first of the words."] * 5000 + ["Zebras quiz."] * 5000
    datasets.Dataset.from_dict({"text": texts, "id": range(10_000)}).save_to_disk(tmp_path / "saved")
    prepare(f"hf:{tmp_path / 'saved'}", tmp_path / "out", vocab_size=200, vocab_sample_bytes=30_000, workers=1)
    assert {"words", "zebras"} <= set(Corpus.open(tmp_path / "out").vocabulary.tokens)


def test_a_stream_tells_its_size_if_it_knows_it(tmp_path, monkeypatch) -> None:
    from largebatch.data.blocks import dataset_bytes
    from largebatch.data.sources import find_sources

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    pytest.importorskip("datasets")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_text('{"text": "One."}\n')
    (source,) = find_sources(f"hf:{tmp_path / 'files'}")
    assert dataset_bytes(source, "text") == 0
    split = {"name": "train", "num_bytes": 1234, "num_examples": 1}
    info = {"features": [{"name": "text", "dtype": "string"}], "splits": [split], "dataset_size": 5678}
    (tmp_path / "files" / "README.md").write_text(f"---\ndataset_info: {json.dumps(info)}\n---\n")
    assert dataset_bytes(source, "text") == 1234


def test_empty_and_duplicate_documents_are_counted_and_dropped(tmp_path, vocab) -> None:
    """Equal but for white space is a duplicate; the first one stays. None and text without a token are empty."""
    texts = ["One. Two.", "", "Three.", "One.   Two.", None, " \n ", "\u200b", "Three.", "three."]
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    manifest = prepare([source], tmp_path / "out", vocab=vocab, heldout=0.0)
    assert read_back(tmp_path / "out") == expected_documents(vocab, [["One. Two."], ["Three."], ["three."]])
    documents = manifest.report["documents"]
    assert documents == {"read": 9, "train": 3, "heldout": 0, "empty": 4, "duplicate": 2, "cut": 0}
    kept = prepare([source], tmp_path / "kept", vocab=vocab, heldout=0.0, drop_duplicates=False)
    assert kept.report["documents"] == documents | {"train": 5}
    assert len(read_back(tmp_path / "kept")) == 5


def test_heldout_documents_are_chosen_by_content(tmp_path, vocab) -> None:
    """Wherever a document stands, and however often, it is on the same side; the share is the one asked for."""
    documents = [[f"This is {''.join('abcdefghij'[int(digit)] for digit in str(i))}."] for i in range(2000)]
    prepare([write_text(tmp_path / "a.txt", documents)], tmp_path / "a", vocab=vocab, heldout=0.1)
    shuffled = [documents[i] for i in np.random.default_rng(0).permutation(2000)] + documents[:300]
    prepare([write_text(tmp_path / "b.txt", shuffled)], tmp_path / "b", vocab=vocab, heldout=0.1, drop_duplicates=False)
    prepare([tmp_path / "a.txt"], tmp_path / "c", vocab=vocab, heldout=0.1, seed=1)

    def sides(directory: Path) -> list[set[bytes]]:
        corpus = Corpus.open(directory)
        return [{np.concatenate(d).tobytes() for d in corpus.split(name)} for name in ("train", "heldout")]

    train, heldout = sides(tmp_path / "a")
    assert not train & heldout
    assert [train, heldout] == sides(tmp_path / "b")
    assert heldout != sides(tmp_path / "c")[1]
    # Binomial(2000, 0.1), six standard deviations.
    assert abs(len(heldout) - 200) <= 6 * np.sqrt(2000 * 0.1 * 0.9)


def test_a_small_corpus_still_holds_a_document_out(tmp_path, vocab) -> None:
    manifest = prepare([write_text(tmp_path / "a.txt", DOCUMENTS[:4])], tmp_path / "out", vocab=vocab, heldout=0.001)
    assert (manifest.report["documents"]["train"], manifest.report["documents"]["heldout"]) == (3, 1)
    single = prepare([write_text(tmp_path / "b.txt", DOCUMENTS[:1])], tmp_path / "single", vocab=vocab)
    assert single.splits["heldout"]["documents"] == 0
    assert any("no document is held out" in note for note in single.report["notes"])
    with pytest.raises(UserError, match="the split 'heldout' holds no document"):
        Corpus.open(tmp_path / "single").split("heldout")


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    """Many blocks of a small input, so that cutting, packing and resuming happen."""
    sources, prepare_module = sys.modules["largebatch.data.blocks"], sys.modules["largebatch.data.prepare"]
    monkeypatch.setattr(sources, "BLOCK_BYTES", 20_000)
    monkeypatch.setattr(prepare_module, "BLOCK_BYTES", 20_000)


def test_the_bytes_do_not_depend_on_workers_or_file_cuts(tmp_path, vocab, demo_documents, small_blocks) -> None:
    """One process, two and three; and the same documents as one file or as twenty give the same tokens."""
    whole = write_text(tmp_path / "whole.txt", demo_documents[:60])
    found = []
    for workers in (1, 2, 3):
        prepare([whole], tmp_path / f"out{workers}", vocab=vocab, workers=workers, shard_tokens=30_000)
        found.append(digests(tmp_path / f"out{workers}"))
    assert found[0] == found[1] == found[2]
    assert sum(name.startswith("train/tokens-") for name in found[0]) > 3
    folder = tmp_path / "parts"
    folder.mkdir()
    for number in range(20):
        write_text(folder / f"{number:02d}.txt", demo_documents[3 * number : 3 * number + 3])
    prepare([folder], tmp_path / "parts_out", vocab=vocab, shard_tokens=30_000)
    parts = digests(tmp_path / "parts_out")
    assert {k: v for k, v in parts.items() if k != "manifest.json"} == {
        k: v for k, v in found[0].items() if k != "manifest.json"
    }


def test_shards_end_with_documents_and_hold_every_token(tmp_path, vocab, demo_documents) -> None:
    source = write_text(tmp_path / "a.txt", demo_documents[:40])
    one = prepare([source], tmp_path / "one", vocab=vocab)
    prepare([source], tmp_path / "many", vocab=vocab, shard_tokens=5000)
    prepare([source], tmp_path / "tiny", vocab=vocab, shard_tokens=1)
    assert len(one.splits["train"]["shards"]) == 1
    expected = read_back(tmp_path / "one")
    for name in ("many", "tiny"):
        assert read_back(tmp_path / name) == expected
    train = Corpus.open(tmp_path / "many").manifest.splits["train"]
    sizes = [shard["tokens"] for shard in train["shards"]]
    assert sum(sizes) == train["tokens"]
    assert [shard["first_token"] for shard in train["shards"]] == np.cumsum([0, *sizes[:-1]]).tolist()
    assert len(sizes) > 10
    assert max(sizes[:-1]) <= 5000 + 4000
    tiny = Corpus.open(tmp_path / "tiny").manifest.splits["train"]
    assert len(tiny["shards"]) == tiny["documents"]


def test_a_huge_document_is_cut_between_lines(tmp_path, vocab, monkeypatch, small_blocks) -> None:
    monkeypatch.setattr(sys.modules["largebatch.data.blocks"], "MAX_DOCUMENT_BYTES", 50_000)
    paragraphs = [f"Paragraph number {i} of a document without an end." for i in range(3000)]
    manifest = prepare([write_text(tmp_path / "a.txt", [paragraphs])], tmp_path / "out", vocab=vocab, heldout=0.0)
    documents = manifest.report["documents"]
    assert documents["read"] == documents["train"] >= 3  # its parts are documents from then on
    assert documents["cut"] == 1
    sentences = " / ".join(read_back(tmp_path / "out")).split(" / ")
    assert sentences == expected_documents(vocab, [[p] for p in paragraphs])
    several = write_text(tmp_path / "b.txt", [["Before."], paragraphs, ["Between."], paragraphs[::-1], ["After."]])
    more = prepare([several], tmp_path / "more", vocab=vocab, heldout=0.0).report["documents"]
    assert more["read"] == more["train"] >= 9
    assert more["cut"] == 2


def test_a_document_without_line_or_space_is_cut_between_characters(tmp_path, vocab, monkeypatch, small_blocks) -> None:
    monkeypatch.setattr(sys.modules["largebatch.data.blocks"], "MAX_DOCUMENT_BYTES", 50_000)
    (tmp_path / "a.txt").write_text("é€😀" * 20_000, encoding="utf-8")
    manifest = prepare([tmp_path / "a.txt"], tmp_path / "out", vocab=vocab, heldout=0.0)
    assert manifest.report["documents"]["cut"] == 1
    assert manifest.report["documents"]["train"] >= 3
    assert manifest.report["characters"] == 60_000


def test_a_vocabulary_is_trained_if_none_is_given(tmp_path, demo_documents) -> None:
    source = write_text(tmp_path / "a.txt", demo_documents[:20])
    manifest = prepare([source], tmp_path / "out", vocab_size=500)
    corpus = Corpus.open(tmp_path / "out")
    assert corpus.vocab_size == manifest.tokenizer["vocab_size"] == 500
    assert manifest.token_dtype == "uint16"
    assert corpus.tokenizer().encode("the cat").tokens[0] == "[CLS]"
    assert manifest.report["unknown_rate"] < 0.01
    cased = prepare([source], tmp_path / "cased", vocab_size=500, lowercase=False)
    assert cased.tokenizer["lowercase"] is False
    assert "Emma" in Corpus.open(tmp_path / "cased").vocabulary.tokens
    tiny = prepare([write_text(tmp_path / "b.txt", DOCUMENTS[:3])], tmp_path / "tiny", vocab_size=5000)
    assert any("vocabulary of" in note for note in tiny.report["notes"])


def test_the_characters_of_a_chinese_text_are_known(tmp_path) -> None:
    """They are more than one piece in thirty, and leave nothing to merge."""
    documents = [["".join(chr(0x4E00 + 7 * i + j) for j in range(7)) + "。"] for i in range(100)]
    manifest = prepare([write_text(tmp_path / "a.txt", documents)], tmp_path / "out", vocab_size=3000)
    assert manifest.report["unknown_tokens"] == 0
    assert manifest.tokenizer["vocab_size"] == 5 + 2 * 700 + 1


def test_a_vocabulary_beyond_16_bits(tmp_path, vocab) -> None:
    big = tmp_path / "big.txt"
    big.write_text(vocab.read_text() + "".join(f"zz{i}\n" for i in range(70_000)))
    manifest = prepare([write_text(tmp_path / "a.txt", [["The zz69999 sat."], ["So."]])], tmp_path / "out", vocab=big)
    assert manifest.token_dtype == "uint32"
    assert any("zz69999" in document for document in read_back(tmp_path / "out"))


def test_the_report_counts_what_is_there(tmp_path, vocab) -> None:
    """Against counts made from the corpus itself, the padding against the instances of the whole split."""
    from largebatch.data import PretrainingInstances

    documents = [*DOCUMENTS, ["漢字 and words."]]
    source = write_text(tmp_path / "a.txt", documents + documents[:9])
    manifest = prepare([source], tmp_path / "out", vocab=vocab, heldout=0.2)
    corpus = Corpus.open(tmp_path / "out")
    splits = [corpus.split("train"), corpus.split("heldout")]
    report = manifest.report
    lengths = [len(sentence) for split in splits for document in split for sentence in document]
    assert report["sentences"] == len(lengths)
    assert report["tokens"] == sum(lengths)
    unknown = sum((np.concatenate(d) == corpus.special_ids["[UNK]"]).sum() for split in splits for d in split)
    assert report["unknown_tokens"] == unknown >= 2
    assert report["unknown_rate"] == unknown / sum(lengths)
    assert report["characters"] == sum(len("\n".join(d)) for d in documents)
    for histogram, values in (
        (report["sentence_tokens"], lengths),
        (report["document_tokens"], [sum(map(len, d)) for split in splits for d in split]),
    ):
        assert sum(histogram.values()) == len(values)
        for name, count in histogram.items():
            low, high = (int(x) for x in (name.split("-") * 2)[:2])
            assert count == sum(low <= value <= high for value in values), name
    for length in (128, 512):
        instances = PretrainingInstances(splits[0], length, seed=0)
        real = instances.batch(0, np.arange(instances.num_instances(0)))["lengths"]
        padding = report["padding"][str(length)]
        assert padding["instances"] == len(real)
        assert padding["padding"] == pytest.approx(1 - real.mean() / length, abs=1e-6)
    text = render_report(manifest)
    assert f"{report['tokens']:,} of" in text
    assert "padding" in text
    assert "duplicate" in text


def test_a_corpus_opens_again_with_its_manifest(tmp_path, vocab) -> None:
    manifest = prepare([write_text(tmp_path / "a.txt", DOCUMENTS)], tmp_path / "out", vocab=vocab)
    assert Manifest.read(tmp_path / "out") == manifest
    assert manifest.inputs == [
        {"name": "a.txt", "bytes": (tmp_path / "a.txt").stat().st_size, "crc32": manifest.inputs[0]["crc32"]}
    ]


def test_preparing_again_does_nothing_for_the_same_and_refuses_other_things(tmp_path, vocab) -> None:
    source = write_text(tmp_path / "a.txt", DOCUMENTS)
    out = tmp_path / "out"
    first = prepare([source], out, vocab=vocab)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert prepare([source], out, vocab=vocab, workers=2) == first
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    for change in ({"seed": 1}, {"heldout": 0.5}, {"lowercase": False}):
        with pytest.raises(UserError, match="already holds a corpus of other inputs or settings"):
            prepare([source], out, vocab=vocab, **change)
    source.write_bytes(source.read_bytes().replace(b"cat", b"rat"))
    with pytest.raises(UserError, match="already holds a corpus of other inputs or settings"):
        prepare([source], out, vocab=vocab)
    assert Manifest.read(out) == first
    assert prepare([source], out, vocab=vocab, overwrite=True) != first
    assert "the r ##at sat" in " ".join(read_back(out))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "out"]


def test_what_is_not_ours_is_left_alone(tmp_path, vocab) -> None:
    source = write_text(tmp_path / "a.txt", DOCUMENTS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="not empty and not a corpus"):
            prepare([source], tmp_path / "out", vocab=vocab, overwrite=overwrite)
    with pytest.raises(UserError, match="a file of that name is in the way"):
        prepare([source], source, vocab=vocab)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    prepare([source], tmp_path / "empty", vocab=vocab)
    assert (tmp_path / "empty" / "manifest.json").is_file()


def test_links_and_mount_points(tmp_path, vocab, monkeypatch) -> None:
    source = write_text(tmp_path / "a.txt", DOCUMENTS)
    (tmp_path / "disk").mkdir()
    for name in ("there", "not_yet"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    (tmp_path / "disk" / "there").mkdir()
    for name in ("there", "not_yet"):
        manifest = prepare([source], tmp_path / name, vocab=vocab)
        assert (tmp_path / name).is_symlink()
        assert Manifest.read(tmp_path / "disk" / name) == manifest
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match="a file of that name is in the way"):
        prepare([source], tmp_path / "loop", vocab=vocab)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "disk")
    with pytest.raises(UserError, match="disk: a mount point, which cannot be replaced; name a directory inside it"):
        prepare([source], tmp_path / "disk", vocab=vocab)
    assert not (tmp_path / "disk.partial").exists()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "there")
    assert prepare([source], tmp_path / "disk" / "there", vocab=vocab).splits  # it is there, and need not be replaced
    with pytest.raises(UserError, match="there: a mount point"):
        prepare([source], tmp_path / "disk" / "there", vocab=vocab, overwrite=True, seed=1)


KILLED = """
import sys, largebatch.data.prepare
from largebatch.data import prepare
for name in ("blocks", "prepare"):
    sys.modules["largebatch.data." + name].BLOCK_BYTES = 20_000
if __name__ == "__main__":
    prepare([sys.argv[1]], sys.argv[2], vocab_size=700, workers=int(sys.argv[3]), progress=False)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_is_continued_to_the_same_bytes(tmp_path, demo_documents, workers: int) -> None:
    """Killed by SIGKILL after a few blocks; the finished ones are not made again, and nothing else is different."""
    source = write_text(tmp_path / "a.txt", demo_documents * 2)
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    environment = os.environ | {"PYTHONPATH": ":".join(sys.path)}

    def run(out: Path) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, str(script), str(source), str(out), str(workers)], env=environment, start_new_session=True
        )

    process = run(tmp_path / "out")
    partial = tmp_path / "out.partial"
    deadline = time.monotonic() + 60
    while len(finished := list(partial.glob("blocks-*/*.block"))) < 5:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    stamps = {path: path.stat().st_mtime_ns for path in finished}
    seen = []
    process = run(tmp_path / "out")
    while process.poll() is None:
        for path, stamp in stamps.items():
            with contextlib.suppress(FileNotFoundError):  # the run removes them at its end
                seen += [path] if path.stat().st_mtime_ns != stamp else []
        time.sleep(0.002)
    assert process.returncode == 0
    assert not seen, "finished blocks were made again"
    assert not partial.exists()
    assert run(tmp_path / "whole").wait() == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_workers_end_with_a_run_that_is_killed_alone(tmp_path, demo_documents) -> None:
    """Each worker holds the output open, so that its end is seen only when all have ended."""
    source = write_text(tmp_path / "a.txt", demo_documents * 2)
    (tmp_path / "killed.py").write_text(KILLED)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "killed.py"), str(source), str(tmp_path / "out"), "2"],
        env=os.environ | {"PYTHONPATH": ":".join(sys.path)},
        start_new_session=True,
        stdout=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out.partial").glob("blocks-*/*.block")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    try:
        process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise


def test_what_a_killed_run_still_writes_is_its_own(tmp_path, monkeypatch) -> None:
    """The same block saved by two at once: what the other has begun must be neither touched nor taken."""
    from largebatch.data.tokenise import TokenBlock

    block = TokenBlock(*[np.arange(3)] * 7)
    written = np.lib.format.write_array_header_1_0

    def write(*arguments) -> None:
        monkeypatch.setattr(np.lib.format, "write_array_header_1_0", written)
        block.save(tmp_path / "1.block")  # by the other, from beginning to end, when this one has begun
        written(*arguments)

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", write)
    block.save(tmp_path / "1.block")
    assert [path.name for path in tmp_path.iterdir()] == ["1.block"]
    assert TokenBlock.load(tmp_path / "1.block").tokens.tolist() == [0, 1, 2]


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"nothing of ours" * 99, None], ids=repr)
def test_a_damaged_block_is_made_again(tmp_path, vocab, damage: bytes | None) -> None:
    """Such as a machine leaves that lost its power; None: the block without its end."""
    source = write_text(tmp_path / "a.txt", DOCUMENTS)
    prepare([source], tmp_path / "whole", vocab=vocab)
    prepare_part([source], tmp_path / "out", (1, 1), vocab=vocab)
    (block,) = tmp_path.glob("out.partial/blocks-*/*.block")
    block.write_bytes(block.read_bytes()[:-1] if damage is None else damage)
    prepare([source], tmp_path / "out", vocab=vocab)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_finished_blocks_serve_however_the_path_is_spelled(tmp_path, vocab, monkeypatch) -> None:
    """Relative, absolute or in a copy; two equal files in two folders are still two."""
    monkeypatch.setattr("largebatch.data.blocks.BLOCK_BYTES", 200)
    for folder in ("here/texts/a", "here/texts/b", "here/texts/c"):
        (tmp_path / folder).mkdir(parents=True)
        write_text(tmp_path / folder / "x.txt", [[f"In {folder[-1]}."], *DOCUMENTS[3:20]])
    write_text(tmp_path / "here/texts/c/x.txt", [["In b."], *DOCUMENTS[3:20]])
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    monkeypatch.chdir(tmp_path / "here")
    settings = {"vocab": vocab, "drop_duplicates": False}
    prepare_part(["texts"], tmp_path / "out", (1, 1), **settings)
    blocks = set((tmp_path / "out.partial").glob("blocks-*/*.block"))
    assert len(blocks) > 10
    monkeypatch.setattr("largebatch.data.pool.BlockTokeniser.__call__", None)
    for given in (tmp_path / "here" / "texts", tmp_path / "there" / "texts", "../there/texts"):
        assert prepare_part([given], tmp_path / "out", (1, 1), **settings) == len(blocks)
    prepare([tmp_path / "there" / "texts"], tmp_path / "out", **settings)
    assert sum("in b" in document for document in read_back(tmp_path / "out")) == 2


def test_two_runs_do_not_work_on_the_same_corpus(tmp_path, vocab) -> None:
    pytest.importorskip("fcntl")
    from largebatch.data.workspace import Workspace

    source = write_text(tmp_path / "a.txt", DOCUMENTS)
    with Workspace(tmp_path / "out"), pytest.raises(UserError, match="another run is preparing this corpus"):
        prepare([source], tmp_path / "out", vocab=vocab)


def test_parts_make_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By three parts of which one ran twice, one of the vocabulary's size, and one that never ran."""
    monkeypatch.setattr("largebatch.data.blocks.BLOCK_BYTES", 200)
    text = write_text(tmp_path / "in.txt", DOCUMENTS)
    settings = {"vocab_size": 300, "progress": False}
    prepare([text], tmp_path / "whole", **settings)
    counts = [prepare_part([text], tmp_path / "parts", (k, 4), **settings) for k in (3, 1, 3, 4)]
    assert counts[0] == counts[2]
    assert min(counts) >= 2
    assert not (tmp_path / "parts").exists()
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("parts.partial/blocks-*/*")}
    assert len(made) == counts[0] + counts[1] + counts[3]
    prepare([text], tmp_path / "parts", **settings)
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")
    assert not (tmp_path / "parts.partial").exists()
    assert prepare_part([text], tmp_path / "parts", (1, 4), **settings) == 0
    assert not (tmp_path / "parts.partial").exists()


def test_a_part_of_a_complete_corpus_is_said_to_be_none(tmp_path: Path, vocab: Path, capsys) -> None:
    from largebatch.cli import main

    text, out = write_text(tmp_path / "in.txt", DOCUMENTS), tmp_path / "out"
    command = ["prepare", str(text), "--out", str(out), "--vocab", str(vocab)]
    assert main([*command, "--part", "1/1"]) == 0
    assert f"part 1/1 is done, in {out}.partial" in capsys.readouterr().out
    assert main(command) == 0
    capsys.readouterr()
    assert main([*command, "--part", "1/1"]) == 0
    assert capsys.readouterr().out == f"corpus: {out}, complete already: there is nothing to do for part 1/1\n"


def test_a_part_that_fails_leaves_the_others_alone(tmp_path: Path) -> None:
    from largebatch.data.workspace import Workspace

    text = write_text(tmp_path / "in.txt", DOCUMENTS)
    settings = {"vocab_size": 300, "progress": False}
    prepare_part([text], tmp_path / "out", (1, 2), **settings)
    before = digests(tmp_path / "out.partial")
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    with pytest.raises(UserError, match=r"bad\.jsonl"):
        prepare_part([bad], tmp_path / "out", (2, 2), **settings)
    assert before.items() <= digests(tmp_path / "out.partial").items()
    with pytest.raises(UserError, match=r"bad\.jsonl"):
        prepare([bad], tmp_path / "out", **settings)
    assert before.items() <= digests(tmp_path / "out.partial").items()
    with Workspace(tmp_path / "out", (1, 2)), Workspace(tmp_path / "out", (2, 2)):
        for part in (None, (2, 2)):
            with pytest.raises(UserError, match="another run"), Workspace(tmp_path / "out", part):
                pass


def test_parts_are_not_thrown_away_by_the_call_that_ends_the_work(tmp_path: Path, vocab: Path) -> None:
    """It forgets the parts' vocabulary; a bad line and the work of an earlier plan are other matters."""
    text = write_text(tmp_path / "in.txt", DOCUMENTS)
    prepare_part([text], tmp_path / "out", (1, 1), vocab=vocab)
    before = digests(tmp_path / "out.partial")
    with pytest.raises(
        UserError, match=r"blocks-\w+: holds parts done with another vocabulary or other settings; give"
    ):
        prepare([text], tmp_path / "out", vocab_size=300)
    assert before.items() <= digests(tmp_path / "out.partial").items()
    prepare([text], tmp_path / "out", vocab=vocab)
    assert not (tmp_path / "out.partial").exists()


def test_a_bad_line_does_not_undo_the_blocks_before_it(tmp_path: Path, vocab: Path, monkeypatch) -> None:
    """Nor does it keep another plan from clearing away what was no part's."""
    monkeypatch.setattr("largebatch.data.blocks.BLOCK_BYTES", 200)
    text = write_text(tmp_path / "in.txt", DOCUMENTS)
    good = text.read_bytes()
    text.write_bytes(good + b"caf\xe9\n")
    with pytest.raises(UserError, match="not UTF-8"):
        prepare([text], tmp_path / "out", vocab=vocab, workers=1)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").glob("blocks-*/*.block")}
    assert len(stamps) > 5
    with pytest.raises(UserError, match="not UTF-8"):
        prepare([text], tmp_path / "out", vocab=vocab, workers=1)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    text.write_bytes(good)
    prepare([text], tmp_path / "out", vocab_size=300)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("part", [(0, 2), (3, 2)])
def test_a_part_that_is_none(part: tuple[int, int], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"part ./2: give k/n with 1 <= k <= n"):
        prepare_part([tmp_path], tmp_path / "out", part)
    with pytest.raises(TypeError, match="unexpected keyword argument 'vocabulary'"):
        prepare_part([tmp_path], tmp_path / "out", (1, 2), vocabulary=3)
