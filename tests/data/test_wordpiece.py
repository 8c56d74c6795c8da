"""Encoding by table equals the tokenizer; a trained vocabulary is the same in every process.

Guards: a word whose pieces depend on its neighbours (combining marks, control characters, punctuation) would make
the table wrong; a vocabulary in hash-table order would make no two corpora equal.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import largebatch.data.wordpiece as wordpiece
from largebatch.data import Vocabulary
from largebatch.data.sentences import split_sentences
from largebatch.data.vocabulary import SPECIAL_TOKENS
from largebatch.data.wordpiece import WordEncoder, plain_tokenizer, save_tokenizer, train_vocabulary
from largebatch.errors import UserError


@pytest.fixture(scope="module")
def trained(demo_paragraphs: list[str]) -> Vocabulary:
    texts = demo_paragraphs[:1500]
    return train_vocabulary(texts, 1500, lowercase=True)


def expected_ids(vocabulary: Vocabulary, lowercase: bool, sentences: list[str]) -> list[list[int]]:
    tokenizer = plain_tokenizer(vocabulary, lowercase)
    return [encoding.ids for encoding in tokenizer.encode_batch(sentences, add_special_tokens=False)]


def encoded(encoder: WordEncoder, sentences: list[str]) -> list[list[int]]:
    ids, lengths = encoder.encode(sentences)
    assert lengths.sum() == len(ids)
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] if sentences else []


@pytest.mark.parametrize("lowercase", [True, False])
def test_encoding_equals_the_tokenizer_on_real_text(trained, demo_paragraphs, lowercase: bool) -> None:
    sentences = [sentence for paragraph in demo_paragraphs[:2000] for sentence in split_sentences(paragraph)]
    assert encoded(WordEncoder(trained, lowercase), sentences) == expected_ids(trained, lowercase, sentences)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    texts=st.lists(
        st.text(max_size=30) | st.text("ab,.-'éÉ\u0301\u200b\x00\x85\ufffd“—_中。İß\u2028\xad", max_size=30), max_size=8
    ),
    lowercase=st.booleans(),
)
def test_encoding_equals_the_tokenizer_on_any_text(trained, texts: list[str], lowercase: bool) -> None:
    """After the cleaning that documents get: single spaces are the only white space, no lone surrogates."""
    sentences = [" ".join(text.encode("utf-8", "ignore").decode().split()) for text in texts]
    assert encoded(WordEncoder(trained, lowercase), sentences) == expected_ids(trained, lowercase, sentences)


def test_no_sentence_gives_no_token(trained) -> None:
    ids, lengths = WordEncoder(trained, True).encode([])
    assert (len(ids), len(lengths)) == (0, 0)
    ids, lengths = WordEncoder(trained, True).encode(["", "a", ""])
    assert lengths.tolist() == [0, 1, 0]


def test_the_table_may_overflow(trained, demo_paragraphs, monkeypatch) -> None:
    expected = encoded(WordEncoder(trained, True), demo_paragraphs[:300])
    monkeypatch.setattr(wordpiece, "_MAX_CACHED_WORDS", 50)
    encoder = WordEncoder(trained, True)
    found = [encoded(encoder, demo_paragraphs[first : first + 7]) for first in range(0, 300, 7)]
    assert [ids for part in found for ids in part][:300] == expected


def test_special_tokens_in_a_text_are_ordinary_words(trained) -> None:
    """ "[MASK]" in a document must not become a [MASK] the model is never asked about."""
    (ids,) = encoded(WordEncoder(trained, True), ["the [MASK] and [SEP]"])
    specials = {trained.special_ids[name] for name in ("[PAD]", "[CLS]", "[SEP]", "[MASK]")}
    assert not specials & set(ids)
    assert len(ids) >= 8


TRAIN = """
import lzma, sys
from largebatch.data.wordpiece import train_vocabulary
text = lzma.open(sys.argv[1], "rt", encoding="utf-8").read(150_000).split("\\n")
print("\\n".join(train_vocabulary(text, 900, lowercase=True).tokens))
"""


def test_training_gives_the_same_vocabulary_in_every_process(demo_text: Path) -> None:
    found = {
        subprocess.run(
            [sys.executable, "-c", TRAIN, str(demo_text)],
            env={"PYTHONPATH": ":".join(sys.path), "RAYON_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "2", "3")
    }
    assert len(found) == 1
    assert len(found.pop().split()) == 900


def test_a_trained_vocabulary_is_what_the_tokenizers_package_trains(demo_paragraphs) -> None:
    """Same procedure, other tie-breaks and characters: at most a few pieces in a hundred differ."""
    from tokenizers import BertWordPieceTokenizer

    texts = demo_paragraphs[:1500]
    ours = train_vocabulary(texts, 1200, lowercase=True)
    theirs = BertWordPieceTokenizer(lowercase=True)
    theirs.train_from_iterator(texts, vocab_size=1200, show_progress=False)
    common = set(ours.tokens) & set(theirs.get_vocab())
    assert len(ours) == theirs.get_vocab_size() == 1200
    assert len(common) >= 0.97 * 1200


def test_a_trained_vocabulary_is_ordered(trained) -> None:
    assert trained.tokens[:5] == SPECIAL_TOKENS
    assert trained.special_ids == {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    assert len(set(trained.tokens)) == len(trained) == 1500
    characters = [token for token in trained.tokens[5:] if len(token) == 1]
    assert characters == sorted(characters) == list(trained.tokens[5 : 5 + len(characters)])
    assert "the" in trained.tokens
    assert trained.continues_word.sum() > 100


def test_rare_characters_are_left_to_the_unknown_token() -> None:
    """One piece in thirty may be a character; the rarest go, ties by code point, and words with them are unknown."""
    rare = "".join(chr(0x4E00 + i) for i in range(100))
    text = ["the cat sat on the mat " * 50 + rare]
    vocabulary = train_vocabulary(text, 138, lowercase=True)
    kept = [c for c in rare if c in vocabulary.tokens]
    assert 0 < len(kept) < 100
    assert kept == list(rare[: len(kept)])
    assert {"the", "cat"} < set(vocabulary.tokens)  # words went before the characters


@pytest.mark.parametrize("first", [0x4E00, 0xAC00], ids=["Chinese", "Korean"])
def test_room_that_words_leave_goes_to_characters(first: int) -> None:
    """A Chinese character is a word of its own, so nothing is merged; Korean ones make words."""
    characters = [chr(first + i) for i in range(600)]
    text = ["the cat sat on the mat " * 50, *("".join(characters[i : i + 2]) for i in range(0, 600, 2))]
    for size in (400, 500):
        vocabulary = train_vocabulary(text, size, lowercase=False)
        assert size - 1 <= len(vocabulary) <= size
        kept = [c for c in characters if c in vocabulary.tokens]
        assert kept == characters[: len(kept)]
        assert all(c in vocabulary.tokens for c in "thecasonm")
    assert set(characters) < set(train_vocabulary(text, 2000, lowercase=False).tokens)


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        ([" \n "], 100, "no visible character"),
        (["the quick brown fox"], 20, "a vocabulary of 20 is too small: 35 pieces"),
    ],
)
def test_untrainable(texts: list[str], size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_vocabulary(texts, size, lowercase=True)


@pytest.mark.parametrize("lowercase", [True, False])
def test_saved_files_load_in_transformers(trained, tmp_path, lowercase: bool) -> None:
    transformers = pytest.importorskip("transformers")
    save_tokenizer(trained, lowercase, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = 'It was Emma\'s; "Élan!" said Mr. Knightley.'
    assert theirs(text, add_special_tokens=False)["input_ids"] == encoded(WordEncoder(trained, lowercase), [text])[0]
    assert theirs.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(trained.special_ids.values())
    assert theirs.mask_token == "[MASK]"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\nthe\n", r"vocab.txt: lacks \[MASK\]; add each as a line"),
        (b"[PAD]\nthe\n", r"lacks \[UNK\] \[CLS\] \[SEP\] \[MASK\]"),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\nthe\n", "vocab.txt, line 7: 'the' repeats line 6"),
        (b"[PAD]\n\n[UNK]\n", "vocab.txt, line 2: empty"),
        (b"", "vocab.txt, line 1: empty"),
        (b"[PAD]\n\xff\n", "vocab.txt: not UTF-8 at byte 6"),
    ],
)
def test_bad_vocabularies(tmp_path, content: bytes, message: str) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        Vocabulary.read(path)


def test_a_vocabulary_may_have_windows_line_ends_and_be_named_by_its_directory(tmp_path) -> None:
    (tmp_path / "vocab.txt").write_bytes("\r\n".join([*SPECIAL_TOKENS, "the", "##s"]).encode())
    assert Vocabulary.read(tmp_path).tokens == (*SPECIAL_TOKENS, "the", "##s")
    with pytest.raises(UserError, match="no such vocabulary"):
        Vocabulary.read(tmp_path / "other.txt")


def test_a_vocabulary_may_begin_with_a_byte_order_mark(tmp_path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, "the"]), encoding="utf-8-sig")
    assert Vocabulary.read(tmp_path).tokens == (*SPECIAL_TOKENS, "the")


@pytest.mark.parametrize("cased", [False, True])
def test_a_vocabulary_is_for_text_of_its_own_case(tmp_path, cased: bool) -> None:
    vocabulary = Vocabulary((*SPECIAL_TOKENS, "the"))
    save_tokenizer(vocabulary, not cased, tmp_path)
    message = "cased; give --cased .*lowercase=False" if cased else "uncased; leave out --cased .*lowercase=True"
    for path in (tmp_path, tmp_path / "vocab.txt"):
        assert Vocabulary.read(path, lowercase=not cased) == vocabulary
        with pytest.raises(UserError, match=f"tokenizer_config.json: the vocabulary is {message}"):
            Vocabulary.read(path, lowercase=cased)
    for content in ("{}", "[]", "not JSON", '{"do_lower_case": null}'):
        (tmp_path / "tokenizer_config.json").write_text(content)
        assert Vocabulary.read(tmp_path, lowercase=cased) == vocabulary


def test_a_vocabulary_may_hold_a_piece_that_is_blank(tmp_path) -> None:
    """As that of bert-base-chinese does: U+2028, at which some would break the line."""
    vocabulary = Vocabulary((*SPECIAL_TOKENS, "the", "\u2028", "##s"))
    save_tokenizer(vocabulary, True, tmp_path)
    assert Vocabulary.read(tmp_path).tokens == vocabulary.tokens


def test_characters_are_counted_alike_however_the_text_is_cut(monkeypatch) -> None:
    texts = ["Für 中文", "", "a b\na", "É" * 5]
    normalizer = plain_tokenizer(Vocabulary((*SPECIAL_TOKENS, "a")), True).normalizer
    counts = [wordpiece._character_counts(some, normalizer) for some in (texts, ["".join(texts)])]
    monkeypatch.setattr(wordpiece, "_LOT", 3)
    counts.append(wordpiece._character_counts(texts, normalizer))
    assert counts[0] == counts[1] == counts[2]
    assert counts[0]["e"] == 5
