"""Opening a corpus: what is damaged, foreign or of another version is refused by name, before anything is trained.

Guards: a shard cut short by a full disk, a flipped byte on a network drive, a tokenizer swapped afterwards.
"""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

import largebatch.data.manifest as manifest_module
from largebatch.data import Corpus, CorpusSplit, Manifest, PretrainingInstances, prepare, unigram_entropy
from largebatch.errors import UserError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, demo_documents) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    text = "\n\n".join("\n".join(document) for document in demo_documents[:30])
    (folder / "a.txt").write_text(text, encoding="utf-8")
    prepare([folder / "a.txt"], folder / "out", vocab_size=500, heldout=0.2, shard_tokens=30_000)
    return folder / "out"


@pytest.fixture
def corpus(prepared: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(prepared, tmp_path / "corpus"))


def test_a_good_corpus_opens(corpus) -> None:
    opened = Corpus.open(corpus)
    assert opened.vocab_size == 500
    assert opened.special_ids == {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
    assert all(path.is_file() for path in opened.tokenizer_files)
    train = opened.split("train")
    assert len(train) == train.num_documents == opened.manifest.splits["train"]["documents"]
    assert sum(len(sentence) for document in train for sentence in document) == train.num_tokens
    assert isinstance(train[0], list)
    with pytest.raises(IndexError):
        train[len(train)]
    with pytest.raises(UserError, match="no split 'test'; there are train, heldout"):
        opened.split("test")


def every_file(corpus: Path) -> list[str]:
    return sorted(path.relative_to(corpus).as_posix() for path in corpus.rglob("*") if path.is_file())


def test_every_file_is_covered(corpus) -> None:
    assert set(every_file(corpus)) == {*Manifest.read(corpus).files, "manifest.json"}
    assert sum("tokens-" in name for name in every_file(corpus)) >= 3


def test_a_missing_file_is_named(corpus) -> None:
    for name in every_file(corpus):
        content = (corpus / name).read_bytes()
        (corpus / name).unlink()
        with pytest.raises(UserError, match=name.rpartition("/")[2]):
            Corpus.open(corpus, verify=False)
        (corpus / name).write_bytes(content)
    Corpus.open(corpus)


def test_a_file_cut_short_is_named_without_reading_it(corpus) -> None:
    for name in every_file(corpus):
        content = (corpus / name).read_bytes()
        (corpus / name).write_bytes(content[:-2])
        with pytest.raises(UserError, match=f"{name}: .*(cut short|damaged)"):
            Corpus.open(corpus, verify=False)
        (corpus / name).write_bytes(content)


def test_a_flipped_bit_is_found_anywhere(corpus) -> None:
    """First, middle, last and random bytes of every file; CRC-32 sees each for certain, the manifest its own."""
    generator = np.random.default_rng(0)
    for name in every_file(corpus):
        content = (corpus / name).read_bytes()
        for position in (0, len(content) // 2, len(content) - 1, *generator.integers(0, len(content), 3).tolist()):
            damaged = bytearray(content)
            damaged[position] ^= 1 << int(generator.integers(8))
            if name == "manifest.json" and damaged.split() == content.split():
                continue  # white space between values
            (corpus / name).write_bytes(damaged)
            with pytest.raises(UserError, match=f"{name}: "):
                Corpus.open(corpus)
        (corpus / name).write_bytes(content)
    Corpus.open(corpus)


def test_without_verify_damage_within_a_shard_goes_unnoticed(corpus) -> None:
    """The companion of the test above: it is the checksum that sees it."""
    path = corpus / "train" / "tokens-00000.npy"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    Corpus.open(corpus, verify=False)


def test_another_tokenizer_is_refused_even_without_verify(corpus) -> None:
    path = corpus / "tokenizer.json"
    path.write_text(path.read_text().replace('"the"', '"eht"'))
    with pytest.raises(UserError, match=r"tokenizer.json: not the tokenizer the tokens were made with"):
        Corpus.open(corpus, verify=False)


def rewrite_manifest(corpus: Path, **changes: object) -> None:
    content = json.loads((corpus / "manifest.json").read_text()) | changes
    content.pop("sha256")
    content["sha256"] = manifest_module._digest(content)
    (corpus / "manifest.json").write_text(json.dumps(content))


def test_other_versions_and_programs_are_refused(corpus, tmp_path) -> None:
    rewrite_manifest(corpus, version=2)
    with pytest.raises(UserError, match="format version 2, but this largebatch reads version 1; prepare"):
        Corpus.open(corpus)
    rewrite_manifest(corpus, format="something")
    with pytest.raises(UserError, match="not the manifest of a largebatch corpus"):
        Corpus.open(corpus)
    (corpus / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match=r"manifest.json: damaged"):
        Corpus.open(corpus)
    with pytest.raises(UserError, match="there is no such corpus directory"):
        Corpus.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no manifest.json in it"):
        Corpus.open(tmp_path)


def test_an_edited_manifest_is_refused(corpus) -> None:
    path = corpus / "manifest.json"
    path.write_text(path.read_text().replace('"heldout": 0.2', '"heldout": 0.3'))
    with pytest.raises(UserError, match="its own checksum does not match"):
        Corpus.open(corpus)


def test_splits_travel_to_loader_processes_by_name(corpus) -> None:
    """A pickled split is its address, not its tokens."""
    split = Corpus.open(corpus).split("train")
    pickled = pickle.dumps(PretrainingInstances(split, 64, seed=0))
    assert len(pickled) < 50_000 < split.num_tokens
    ours = PretrainingInstances(split, 64, seed=0).batch(0, np.arange(20))
    theirs = pickle.loads(pickled).batch(0, np.arange(20))
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    in_memory = CorpusSplit.from_documents([[[5, 6], [7]], [[8]]], split.vocabulary)
    assert [np.concatenate(d).tolist() for d in pickle.loads(pickle.dumps(in_memory))] == [[5, 6, 7], [8]]


def test_unigram_entropy_is_its_definition(corpus) -> None:
    """Against a direct sum; within one split and unsmoothed it would be the entropy, which it then nearly is."""
    opened = Corpus.open(corpus)
    train, heldout = (np.concatenate([np.concatenate(d) for d in opened.split(name)]) for name in ("train", "heldout"))
    p = (np.bincount(train, minlength=500) + 1) / (len(train) + 500)
    expected = -np.mean([np.log(p[token]) for token in heldout.tolist()])
    assert unigram_entropy(opened) == pytest.approx(expected, rel=1e-12)
    q = np.bincount(train, minlength=500) / len(train)
    entropy = -(q[q > 0] @ np.log(q[q > 0]))
    assert 0 <= unigram_entropy(opened, heldout="train") - entropy < 500 / len(train)
    assert unigram_entropy(opened) > entropy


def test_masked_labels_have_the_unigram_entropy(corpus) -> None:
    """Candidates are masked uniformly, so the labels' cross-entropy estimates the same number.

    Instances weigh tokens unevenly (capped predictions, random sentences taken twice), hence 2% and not the
    statistical error, which is under 1%.
    """
    opened = Corpus.open(corpus)
    instances = PretrainingInstances(opened.split("train"), 128, seed=0)
    labels = instances.batch(0, np.arange(instances.num_instances(0)))["masked_labels"]
    train = np.concatenate([np.concatenate(d) for d in opened.split("train")])
    log_p = np.log((np.bincount(train, minlength=500) + 1) / (len(train) + 500))
    assert -log_p[labels].mean() == pytest.approx(unigram_entropy(opened, heldout="train"), rel=0.02)
