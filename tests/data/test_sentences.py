"""The splitter on the cases that trip splitters, and its promise to lose and reorder nothing.

Guards: packing and next-sentence pairs are built from these units; an abbreviation taken for an end gives pairs of
fragments, a missed end gives sentences that never fit.
"""

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from largebatch.data.sentences import split_sentences

# "|" marks the sentence ends.
CASES = [
    "One sentence.",
    "no full stop at all",
    "Hello there. |How are you? |Fine!",
    "It rained.  |We stayed.   |All day.",
    # Titles, abbreviations, initials.
    "Mr. and Mrs. Weston met Dr. Jones. |They spoke.",
    "He saw Prof. Smith, Rev. Brown and Gen. Lee. |Nobody else came.",
    "J. R. R. Tolkien wrote it. |It sold well.",
    "J.K. Rowling wrote it, and George W. Bush read it. |So they say.",
    "The U.S. Senate met. |The U.S. President spoke.",
    "He moved to the U.S. |He stayed there.",
    "She has a Ph.D. in physics. |She got her Ph.D. |Then she left.",
    "At 5 p.m. Monday it closed. |It opened at 9 a.m. |We came later.",
    "Acme Inc. Chairman Jones resigned. |He had founded Acme Inc. |It failed.",
    "John Smith Jr. Boulevard was named after John Smith Jr. |He liked it.",
    "Apples, pears, etc. are fruit. |Nuts, seeds, etc. |They are not.",
    "See e.g. Smith, i.e. the first one, cf. Jones. |It helps.",
    "Roe vs. Wade was decided. |It was 1973.",
    "It was so, and so am I. |He was not.",
    "King Edward I. Stuart is no name.",
    # Numbers.
    "See Fig. 3 and No. 7 on p. 12. |Then stop.",
    "No. |He said no more.",
    "On Jan. 5 it snowed. |In Jan. |It thawed.",
    "It cost $3.50. |Cheap!",
    "Pi is 3.14159 and e is 2.71828. |Both are transcendental.",
    "Introduced in version 3.4. |Unlike most others, it works.",
    "It happened in 1999. |Then came 2000.",
    "1. Introduction",
    '"Mrs. Weston!--Mr. Knightley!" she cried. |"I can\'t. |Bob can."',
    "IV. The Robbers of the Wood",
    "A. The first point. |B. The second.",
    # Quotations and brackets.
    '"Why?" she asked. |"Because," he said. |"I see."',
    "“Go!” he cried. |“Now!” |They went.",
    "He said “Stop.” |Then he left.",
    "(It was late.) |They slept.",
    "He left (at last!). |She stayed [alone].",
    "It ended there.[12] |The next began.",
    "`` No evidence '' was found. |`` None '', he said. |Well.",
    # Ellipses and repeated marks.
    "Well... I do not know.",
    "He paused... |Nobody spoke.",
    "He paused… |Nobody spoke.",
    "She waited . . . and waited. |At last . . . |Nothing came.",
    "What?! |Really?? |Yes!!!",
    "Stop! in the name of love.",
    "Ask Yahoo! about it. |They know.",
    # Dashes and files.
    "He ran.-- |She walked.",
    "Edit config.h and run it. |The file config.h. |Done.",
    "Visit www.example.com today. |Or tomorrow.",
    # Other scripts.
    "Él llegó. |¿Quién? |Ángel.",
    "これは文です。|次の文です！|終わり",
    "Это первое. |Вот второе.",
    "Das ist so. |Ähnlich ist das.",
    "यह पहला है। |क्या यह दूसरा है? |हाँ॥ |३ और।",
    "یہ پہلا ہے۔ |کیا یہ دوسرا ہے؟ |ہاں۔",
    "پی۔ایچ۔ڈی کی ڈگری۔ |پھر وہ چلا گیا۔",
    "هل هذا صحيح؟ |نعم! |«أحقا؟» |قال.",
    "ይህ የመጀመሪያው ነው። |ይህስ ምንድን ነው፧ |ሁለተኛው።",
    "Սա առաջինն է։ |Սա երկրորդն է։ |Վերջ։",
    "ｺﾚﾊﾌﾞﾝ｡|ﾂｷﾞﾉﾌﾞﾝ｡|ｵﾜﾘ",
]


@pytest.mark.parametrize("case", CASES)
def test_cases(case: str) -> None:
    expected = [sentence.strip() for sentence in case.split("|")]
    assert split_sentences(case.replace("|", "")) == expected


def test_nothing_gives_nothing() -> None:
    assert split_sentences("") == []
    assert split_sentences("   ") == []


words = st.sampled_from(
    [
        "Mr.",
        "He",
        "ran.",
        "U.S.",
        "No.",
        "5",
        '"Why?"',
        "she",
        "…",
        "...",
        "(so)",
        "I.",
        "e.g.",
        "。",
        "।",
        "｡",
        "Ünder",
        "!",
        "x.y",
        "'",
        "--",
    ]
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(words | st.text(max_size=6), max_size=30))
def test_no_character_is_lost_or_moved(parts: list[str]) -> None:
    paragraph = " ".join(" ".join(parts).split())
    sentences = split_sentences(paragraph)
    assert "".join("".join(sentences).split()) == "".join(paragraph.split())
    assert all(sentence and sentence == sentence.strip() for sentence in sentences)


def test_time_is_linear_in_hostile_input() -> None:
    """A pattern that backtracks would need hours for these; a test's time limit is the bound."""
    for hostile in (
        "." * 200_000,
        "。" * 200_000,
        "।" * 200_000,
        ". " * 100_000,
        '."' * 100_000,
        "A. " * 60_000,
        "I. X " * 40_000,
        ". (" * 60_000 + "x",
        "x" * 10**6,
    ):
        sentences = split_sentences(hostile)
        assert "".join("".join(sentences).split()) == "".join(hostile.split())


def test_real_prose_has_sentences_of_the_usual_length(demo_paragraphs: list[str]) -> None:
    """Literary English has 15 to 35 words a sentence; a splitter that misses or invents every third end leaves that.

    And no sentence ends in a title: those ends would be wrong for certain.
    """
    sentences = list(itertools.chain.from_iterable(map(split_sentences, demo_paragraphs)))
    num_words = sum(len(sentence.split()) for sentence in sentences)
    assert len(sentences) > 3000
    assert 15 < num_words / len(sentences) < 35
    assert not [s for s in sentences if re.search(r"\b(Mr|Mrs|Dr|St)\.$", s)]
    assert len(sentences) > 1.5 * len(demo_paragraphs)
