"""Reading SQuAD files: what is right is kept as it is; each way of being wrong is one clear line, not a traceback.

Guards: an answer that is not in its context at its offset must never become a training label in silence (435 questions
of the SQuADShifts files would), and must still count in the score, which knows texts alone.
"""

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from largebatch.errors import UserError
from largebatch.evaluate import read_squad

CONTEXT = "The Rhine is in Europe.\nIt is 1,230 km long."


def content(**changes: Any) -> dict[str, Any]:
    """A valid file of one question; `changes` replace keys of its answer, question, paragraph, article or top."""
    answer = {"text": "Europe", "answer_start": 16}
    question = {"id": "q7", "question": "Where is the Rhine?", "answers": [answer]}
    paragraph = {"context": CONTEXT, "qas": [question]}
    article = {"title": "Rhine", "paragraphs": [paragraph]}
    top = {"version": "1.1", "data": [article]}
    for level in (answer, question, paragraph, article, top):
        for key in list(level):
            if key in changes:
                level[key] = changes[key]
            if changes.get(f"no_{key}"):
                del level[key]
    return top


def test_reads_what_the_file_says(squad_file: Callable[..., Path]) -> None:
    path = squad_file(
        (CONTEXT, "Where?", [("Europe", 16), ("in Europe", 13)]), (CONTEXT, "How long?", "1,230 km"), extra="ignored"
    )
    dataset = read_squad(path)
    assert [example.id for example in dataset] == ["q0", "q1"]
    first, second = dataset.examples
    assert first.context == CONTEXT
    assert first.gold_texts == ("Europe", "in Europe")
    assert first.training_answer is first.answers[0]
    assert second.answers[0].start == CONTEXT.index("1,230 km")
    assert (dataset.num_articles, dataset.num_answers, dataset.bad_answers) == (1, 3, ())
    assert str(dataset) == "squad.json: 2 questions of 1 articles"


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress, bytes])
@pytest.mark.parametrize("name", ["squad.json", "squad.json.gz", "squad.json.xz"])
def test_compression_is_told_from_the_content(tmp_path: Path, compress: Callable[[bytes], bytes], name: str) -> None:
    path = tmp_path / name
    path.write_bytes(compress(b"\xef\xbb\xbf" + json.dumps(content()).encode()))  # with a byte-order mark
    assert read_squad(path).examples[0].question == "Where is the Rhine?"


@pytest.mark.parametrize("version", ["1.1", "1.0", "v1.1", None])
def test_versions_of_the_format_are_read(tmp_path: Path, version: str | None) -> None:
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(content(no_version=True) if version is None else content(version=version)))
    assert len(read_squad(path)) == 1


BAD_CONTENT = {
    "list on top": ([], "not a SQuAD file"),
    "no data": (content(no_data=True), 'the file has no "data"'),
    "data of wrong type": (content(data={}), '"data" must be a list, got {}'),
    "no questions": (content(data=[]), "holds no questions"),
    "version 2.0": (content(version="v2.0"), "SQuAD version '2.0' cannot be used"),
    "another version": (content(version="3"), "SQuAD version '3' cannot be used"),
    "article is text": (content(data=["x"]), "article 'number 1' is not a JSON object"),
    "no paragraphs": (content(no_paragraphs=True), "article 'Rhine' has no \"paragraphs\""),
    "no context": (content(no_context=True), "article 'Rhine', paragraph 1 has no \"context\""),
    "empty context": (content(context=" \n"), "article 'Rhine', paragraph 1: the context is empty"),
    "no qas": (content(no_qas=True), "article 'Rhine', paragraph 1 has no \"qas\""),
    "no id": (content(no_id=True), "a question of article 'Rhine', paragraph 1 has no \"id\""),
    "id is a number": (content(id=7), '"id" must be a string, got 7'),
    "no question": (content(no_question=True), 'question q7 has no "question"'),
    "no answers": (content(no_answers=True), 'question q7 has no "answers"'),
    "empty answers": (content(answers=[]), "question q7: there are no answers"),
    "no text": (content(no_text=True), "an answer of article 'Rhine', paragraph 1, question q7 has no \"text\""),
    "no start": (content(no_answer_start=True), 'question q7 has no "answer_start"'),
    "start is true": (content(answer_start=True), '"answer_start" must be an integer, got True'),
    "start is text": (content(answer_start="16"), "\"answer_start\" must be an integer, got '16'"),
    "half a character": (content(context="Europe \ud83d"), "half a character"),
    "wrong start": (content(answer_start=15), "'Europe' is not in its context at character 15 (it is at 16)"),
    "start before the context": (content(answer_start=-28), "not in its context at character -28 (it is at 16)"),
    "start beyond the context": (content(answer_start=999), "not in its context at character 999 (it is at 16)"),
    "not in the context": (content(text="Asia"), "'Asia' is not in its context at character 16 (it is nowhere in it)"),
    "empty answer": (content(text=""), "'' is not in its context"),
    "answer of many lines": (content(text="Asia\n" * 30), "'Asia\\nAsia\\n"),
}


@pytest.mark.parametrize("case", BAD_CONTENT)
def test_a_wrong_file_is_one_clear_line(tmp_path: Path, case: str) -> None:
    value, expected = BAD_CONTENT[case]
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(value))
    with pytest.raises(UserError) as caught:
        read_squad(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert expected in message
    assert "\n" not in message
    assert "; " in message  # what is wrong; what to do


BAD_BYTES = {
    "empty": (b"", "the file is empty"),
    "blank": (b" \n\n", "the file is empty"),
    "not UTF-8": (b'{"data":\n"\xff"}', ":2: not UTF-8 (byte 10)"),
    "not JSON": (b'{"data":\n\n [}', ":3: not valid JSON"),
    "cut short": (json.dumps(content()).encode()[:-20], "not valid JSON"),
    "xz cut short": (lzma.compress(json.dumps(content()).encode())[:-20], "damaged or cut short"),
    "xz with a flipped byte": (lzma.compress(b"{}" * 99)[:40] + b"\x00" + lzma.compress(b"{}" * 99)[41:], "damaged"),
    "gzip cut short": (gzip.compress(json.dumps(content()).encode())[:-20], "damaged or cut short"),
    "nested too deeply": (b"[" * 100_000, "squad.json"),
}


@pytest.mark.parametrize("case", BAD_BYTES)
def test_unreadable_bytes_are_one_clear_line(tmp_path: Path, case: str) -> None:
    value, expected = BAD_BYTES[case]
    path = tmp_path / "squad.json"
    path.write_bytes(value)
    with pytest.raises(UserError, match="; ") as caught:
        read_squad(path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.json: cannot be read \(No such file"):
        read_squad(tmp_path / "nowhere.json")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory"):
        read_squad(tmp_path)


def test_duplicate_ids_and_unanswerable_questions_name_their_line(tmp_path: Path) -> None:
    top = content()
    questions = top["data"][0]["paragraphs"][0]["qas"]
    questions.append(dict(questions[0]))
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(top, indent=1))
    line = path.read_text().split("\n").index('       "id": "q7",') + 1
    with pytest.raises(UserError, match=rf"squad\.json:{line}: .*question q7: the id is used twice"):
        read_squad(path)
    questions[1] = {"id": "q8", "question": "?", "answers": [], "is_impossible": True}
    path.write_text(json.dumps(top))
    with pytest.raises(UserError, match=r"squad\.json:1: .*question q8: a question without an answer \(SQuAD v2\.0\)"):
        read_squad(path)


def test_skipping_counts_and_keeps_the_text_for_scoring(squad_file: Callable[..., Path]) -> None:
    path = squad_file(
        (CONTEXT, "Where?", [("Asia", 16), ("Europe", 16)]),
        (CONTEXT, "Where?", [("Europe", 3)]),
        (CONTEXT, "Where?", "Europe"),
    )
    with pytest.raises(UserError, match="leave such answers out of training: --skip-bad-answers, on_bad_answer='skip'"):
        read_squad(path)
    dataset = read_squad(path, on_bad_answer="skip")
    assert dataset.bad_answers == ("q0", "q1")
    assert dataset.num_untrainable == 1
    assert str(dataset) == (
        "squad.json: 3 questions of 1 articles; 2 of 4 answers are not at their offset, "
        "so 1 questions cannot be trained on"
    )
    assert [e.gold_texts for e in dataset] == [("Asia", "Europe"), ("Europe",), ("Europe",)]
    starts = [e.training_answer.start if e.training_answer else None for e in dataset]
    assert starts == [16, None, 16]
    with pytest.raises(ValueError, match="on_bad_answer must be"):
        read_squad(path, on_bad_answer="ignore")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "questions", "bad", "untrainable"),
    [
        ("squaddev_v1.1", 10565, 15, 0),
        ("nyt_v1.0", 10056, 10, 1),
        ("reddit_v1.0", 9767, 22, 4),
        ("amazon_reviews_v1.0", 9877, 947, 311),
        ("new_wiki_v1.0", 7936, 8, 0),
    ],
)
def test_real_files(shared_data: Path, name: str, questions: int, bad: int, untrainable: int) -> None:
    """Counts taken from the files by a separate script, with nothing of this package, on 2026-11-21."""
    path = shared_data / "squad" / f"{name}.json.xz"
    dataset = read_squad(path, on_bad_answer="skip")
    assert (len(dataset), len(dataset.bad_answers), dataset.num_untrainable) == (questions, bad, untrainable)
    with pytest.raises(UserError, match=rf"{name}\.json\.xz:\d+: article .*, question \w+: the answer"):
        read_squad(path)
