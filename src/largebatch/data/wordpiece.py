"""WordPiece: training a vocabulary deterministically, and encoding sentences at several times the usual speed."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from largebatch.errors import UserError

from .vocabulary import SPECIAL_TOKENS, Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.normalizers import Normalizer
    from tokenizers.pre_tokenizers import PreTokenizer

_MAX_CODE_POINTS = 0x110000
_LOT = 1 << 20  # characters that are counted at a time
# Punctuation is a word of its own for BERT, whatever stands beside it, so cutting there changes nothing; all of these
# are of Unicode's category P or ASCII symbols, which is BERT's definition.
_PUNCTUATION = r"!-/:-@\[-`{-~“”‘’–—…«»"
_CUT = re.compile(rf"\n|[{_PUNCTUATION}]|[^ \n{_PUNCTUATION}]+")
_MAX_CACHED_WORDS = 500_000
# Sentences are encoded in parts of about this many characters: the words of a part are Python strings, 60 bytes each.
_PART_CHARACTERS = 1 << 20


def plain_tokenizer(vocabulary: Vocabulary, lowercase: bool) -> "Tokenizer":
    """BERT's normalisation and WordPiece without special tokens: "[MASK]" in a text is three ordinary words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def save_tokenizer(vocabulary: Vocabulary, lowercase: bool, directory: Path) -> None:
    """Write vocab.txt, tokenizer.json and tokenizer_config.json, as `transformers` loads them."""
    from tokenizers import BertWordPieceTokenizer

    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    tokenizer = BertWordPieceTokenizer(ids, lowercase=lowercase)
    (directory / "vocab.txt").write_text("".join(token + "\n" for token in vocabulary.tokens), encoding="utf-8")
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": lowercase,
        "strip_accents": None,
        "tokenize_chinese_chars": True,
        "model_max_length": 512,
        **{f"{token.strip('[]').lower()}_token": token for token in SPECIAL_TOKENS},
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


class WordEncoder:
    """Sentences -> token ids, exactly as the tokenizer gives them, through a table of the words met so far.

    A word's pieces do not depend on its neighbours, and a text has few different words: each is tokenised once, and a
    sentence becomes table look-ups over whole batches.

    Args:
        vocabulary: the word pieces.
        lowercase: lower-case the text and strip accents, as BERT's uncased models do.
    """

    def __init__(self, vocabulary: Vocabulary, lowercase: bool) -> None:
        self._tokenizer = plain_tokenizer(vocabulary, lowercase)
        self._clear()

    def _clear(self) -> None:
        self._number = {"\n": 0}
        self._first = np.zeros(1, dtype=np.int64)
        self._size = np.zeros(1, dtype=np.int64)
        self._pieces = np.zeros(0, dtype=np.uint32)

    def encode(self, sentences: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """The ids of all sentences in a row, and the number of ids of each.

        Args:
            sentences: without line breaks, and with no white space but single spaces.
        """
        first = size = 0
        tokens, lengths = [np.zeros(0, dtype=np.uint32)], [np.zeros(0, dtype=np.int64)]
        for end, sentence in enumerate(sentences, 1):
            size += len(sentence)
            if size >= _PART_CHARACTERS or end == len(sentences):
                part = self._encode_part(sentences[first:end])
                tokens.append(part[0])
                lengths.append(part[1])
                first, size = end, 0
        return np.concatenate(tokens), np.concatenate(lengths)

    def _encode_part(self, sentences: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        words = _CUT.findall("\n".join(sentences))
        new = sorted(set(words).difference(self._number))
        if new:
            if len(self._number) + len(new) > _MAX_CACHED_WORDS:
                self._clear()
                new = sorted(set(words) - {"\n"})
            self._learn(new)
        number = np.fromiter(map(self._number.__getitem__, words), dtype=np.int64, count=len(words))
        size = self._size[number]
        end = np.cumsum(size)
        total = int(end[-1]) if len(end) else 0
        source = np.repeat(self._first[number] - (end - size), size) + np.arange(total)
        breaks = end[np.flatnonzero(number == 0)]
        return self._pieces[source], np.diff(breaks, prepend=0, append=total)

    def _learn(self, words: list[str]) -> None:
        encodings = self._tokenizer.encode_batch_fast(words, add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        size = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        first = len(self._pieces) + np.cumsum(size) - size
        self._number.update(zip(words, itertools.count(len(self._number))))
        self._first = np.concatenate([self._first, first])
        self._size = np.concatenate([self._size, size])
        pieces = np.fromiter(itertools.chain.from_iterable(ids), dtype=np.uint32, count=int(size.sum()))
        self._pieces = np.concatenate([self._pieces, pieces])


def train_vocabulary(texts: Sequence[str], vocab_size: int, lowercase: bool) -> Vocabulary:
    """Train a WordPiece vocabulary; the same texts give the same pieces in the same order.

    `tokenizers` merges pairs by count and breaks ties by the ids of their parts, and it numbers the characters in the
    order of a hash table seeded anew in every process (seen 2026-11-21 with 0.23: same pieces, other ids). Here all
    characters get their ids beforehand, so that the merges are determined.

    One piece in thirty may be a character, as in BERT's own vocabulary, at least 64 and at most 1,000. Where the words
    of the text leave pieces over, as Chinese does, whose characters are words, further characters get them.

    Args:
        texts: any pieces of text.
        vocab_size: pieces wanted, the five special ones included; a text of few words and characters gives fewer.
        lowercase: as in `WordEncoder`.

    Raises:
        UserError: the texts hold no character, or more different characters than fit.
    """
    from tokenizers import normalizers, pre_tokenizers

    normalizer, pre_tokenizer = normalizers.BertNormalizer(lowercase=lowercase), pre_tokenizers.BertPreTokenizer()
    counts = _character_counts(texts, normalizer)
    if not counts:
        raise UserError("no vocabulary can be trained: the input holds no visible character")
    ranked = sorted(counts, key=lambda c: (-counts[c], c))
    continues = {c: len(pre_tokenizer.pre_tokenize_str("a" + c)) == 1 for c in ranked}
    # The special tokens, and the characters to each rank: as a word's beginning, and as its continuation.
    fixed = len(SPECIAL_TOKENS) + np.cumsum([1 + continues[c] for c in ranked])
    num = min(len(ranked), max(64, min(1000, vocab_size // 30)))
    if vocab_size <= fixed[num - 1]:
        raise UserError(
            f"a vocabulary of {vocab_size} is too small: {fixed[num - 1]} pieces go to special tokens and characters"
        )
    while True:
        alphabet = sorted(ranked[:num])
        continuing = ["##" + c for c in alphabet if continues[c]]
        vocabulary = _train(texts, vocab_size, alphabet, continuing, normalizer, pre_tokenizer)
        room = vocab_size - len(vocabulary)
        if (fitting := int(np.searchsorted(fixed, fixed[num - 1] + room, side="right"))) == num:
            return vocabulary
        num = fitting


def _train(
    texts: Sequence[str],
    vocab_size: int,
    alphabet: list[str],
    continuing: list[str],
    normalizer: "Normalizer",
    pre_tokenizer: "PreTokenizer",
) -> Vocabulary:
    from tokenizers import Tokenizer, models, trainers

    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        special_tokens=[*SPECIAL_TOKENS, *continuing],
        show_progress=False,
    )
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.train_from_iterator(texts, trainer)
    ids = tokenizer.get_vocab()
    first = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet, *continuing])}
    return Vocabulary(tuple(sorted(ids, key=lambda token: (first.get(token, len(first)), ids[token]))))


def _lots(texts: Sequence[str]) -> Iterator[str]:
    """Join texts by line breaks: counting costs as much as a million characters, however few there are."""
    lot, length = [], 0
    for text in texts:
        lot.append(text)
        length += len(text)
        if length >= _LOT:
            yield "\n".join(lot)
            lot, length = [], 0
    yield "\n".join(lot)


def _character_counts(texts: Sequence[str], normalizer: "Normalizer") -> Counter[str]:
    """How often each character occurs after normalisation, which works on each character by itself."""
    raw = np.zeros(_MAX_CODE_POINTS, dtype=np.int64)
    for text in _lots(texts):
        raw += np.bincount(np.frombuffer(text.encode("utf-32-le"), dtype="<u4"), minlength=_MAX_CODE_POINTS)
    counts: Counter[str] = Counter()
    for code_point in np.flatnonzero(raw).tolist():
        for character in normalizer.normalize_str(chr(code_point)):
            if not character.isspace():
                counts[character] += int(raw[code_point])
    return counts
