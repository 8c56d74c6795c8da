"""Windows over contexts, and the map between characters and tokens.

Guards: an answer label that is off by a token, a token of the context that no window scores, text that comes back
changed (lower case, lost accents, joined pieces), and a tokenizer's own truncation cutting contexts in silence.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from largebatch.errors import UserError
from largebatch.evaluate import SquadDataset, SquadFeatures, read_squad, squad_features
from largebatch.evaluate.squad_features import _max_context_window, _windows, bare_copy

CLS, SEP, PAD = 2, 3, 0


def context_tokens(features: SquadFeatures, example: int) -> int:
    """Number of tokens in the context of a question: where its last window ends."""
    last = int(np.flatnonzero(features.example_index == example)[-1])
    in_window = int(features.lengths[last] - features.context_start[last] - 1)
    first = int(np.flatnonzero(features.example_index == example)[0])
    return int(features.char_start[last] - features.char_start[first]) + in_window


def slow_windows(num_tokens: int, room: int, stride: int) -> list[tuple[int, int]]:
    """The sliding windows as Devlin et al. published them: step by `stride` until the end is reached."""
    windows, start = [], 0
    while True:
        length = min(num_tokens - start, room)
        windows.append((start, start + length))
        if start + length == num_tokens:
            return windows
        start += min(length, stride)


def slow_max_context(windows: list[tuple[int, int]], token: int) -> int:
    """The window that scores a token, by the published rule."""
    best, best_score = -1, -1.0
    for index, (start, stop) in enumerate(windows):
        if start <= token < stop:
            score = min(token - start, stop - 1 - token) + 0.01 * (stop - start)
            if score > best_score + 1e-9:  # the published sum rounds; a tie goes to the first
                best, best_score = index, score
    return best


def test_windows_and_max_context_equal_the_published_loops() -> None:
    rng = np.random.default_rng(0)
    num_overlapping = 0
    for _ in range(400):
        num_tokens, room, stride = (int(rng.integers(low, high)) for low, high in ((0, 300), (1, 80), (1, 100)))
        starts, stops = _windows(num_tokens, room, stride)
        expected = slow_windows(num_tokens, room, stride)
        assert list(zip(starts.tolist(), stops.tolist(), strict=True)) == expected
        owners = _max_context_window(starts, stops, num_tokens)
        assert owners.tolist() == [slow_max_context(expected, token) for token in range(num_tokens)]
        num_overlapping += len(expected) > 1 and stride < room
    assert num_overlapping > 100


def test_every_token_is_scored_in_exactly_one_window(extract: dict[str, SquadDataset], tokenizer: Tokenizer) -> None:
    """Small windows, so that contexts take up to dozens; every context token is there, in order, and owned once."""
    examples = extract["test"].examples[:60]
    features = squad_features(examples, tokenizer, max_seq_length=40, doc_stride=7, max_query_length=20)
    assert len(features) > 10 * len(examples)
    bare = bare_copy(tokenizer)
    for index, example in enumerate(examples):
        expected = bare.encode(example.context, add_special_tokens=False)
        owned: dict[int, int] = {}
        seen: set[int] = set()
        for window in np.flatnonzero(features.example_index == index).tolist():
            begin, end = features.offsets[window : window + 2].tolist()
            start = int(features.context_start[window])
            ids = features.token_ids[begin:end].tolist()
            question = bare.encode(example.question, add_special_tokens=False).ids[:20]
            assert ids[:start] == [CLS, *question, SEP]
            assert ids[-1] == SEP
            assert len(ids) <= 40
            assert not features.max_context[begin : begin + start].any()
            assert not features.max_context[end - 1]
            shift = int(features.char_start[window] - features.char_start[features.example_index == index][0])
            for position in range(start, len(ids) - 1):
                token = shift + position - start
                assert ids[position] == expected.ids[token]
                assert (
                    tuple(features.char_spans[features.char_start[window] + position - start])
                    == (expected.offsets[token])
                )
                seen.add(token)
                if features.max_context[begin + position]:
                    assert token not in owned
                    owned[token] = window
        assert seen == set(owned) == set(range(len(expected.ids)))


def test_labels_mark_the_answer_or_cls(extract: dict[str, SquadDataset], tokenizer: Tokenizer) -> None:
    features = squad_features(
        extract["test"].examples, tokenizer, max_seq_length=64, doc_stride=16, max_query_length=24
    )
    marked = features.start_positions > 0
    assert 0.1 < marked.mean() < 0.9
    assert (marked == (features.end_positions > 0)).all()
    assert set(features.example_index[marked]) == set(range(len(features.examples)))  # each answer is in some window
    for window in range(len(features)):
        example = features.examples[features.example_index[window]]
        answer = example.training_answer
        assert answer is not None
        assert answer.start is not None
        begin, end = answer.start, answer.start + len(answer.text)
        row = int(features.char_start[window])
        spans = features.char_spans[row : row + int(features.lengths[window] - features.context_start[window]) - 1]
        inside = spans[0, 0] <= begin and spans[-1, 1] >= end
        assert marked[window] == inside
        if inside:
            found = features.text(window, int(features.start_positions[window]), int(features.end_positions[window]))
            assert answer.text.strip() in found
            # No token could be spared at either end.
            first = row + int(features.start_positions[window] - features.context_start[window])
            last = row + int(features.end_positions[window] - features.context_start[window])
            assert features.char_spans[first, 1] > begin
            assert features.char_spans[last, 0] < end


def test_every_answer_of_the_real_development_set_comes_back(dev_features: SquadFeatures) -> None:
    """An answer that begins and ends where tokens do comes back to the letter; any other ("gold" of "golden") whole.

    Those others are answers that no tokeniser of this vocabulary can give: fewer than 1%.
    """
    features = dev_features
    assert int(features.lengths.max()) == 384
    assert set(features.example_index[features.start_positions > 0]) == set(range(len(features.examples)))
    num_exact = num_others = 0
    for window in np.flatnonzero(features.start_positions).tolist():
        answer = features.examples[features.example_index[window]].training_answer
        assert answer is not None
        assert answer.start is not None
        row = int(features.char_start[window] - features.context_start[window])
        start, end = int(features.start_positions[window]), int(features.end_positions[window])
        edges = (int(features.char_spans[row + start, 0]), int(features.char_spans[row + end, 1]))
        found = features.text(window, start, end)
        if edges == (answer.start, answer.start + len(answer.text)):
            assert found == answer.text
            num_exact += 1
        else:
            assert answer.text.strip() in found
            num_others += 1
    assert num_others < 0.01 * num_exact


def test_text_comes_back_as_it_was(squad_file: Callable[..., Path], tokenizer: Tokenizer) -> None:
    """Case, accents, CJK, Hangul, emoji, non-breaking and zero-width spaces, combining marks, soft hyphens."""
    pieces = [
        "The ÉCOLE",
        "naïve\u00a0café",
        "e\u0301cole",
        "東京 都",
        "한국어",
        "👩\u200d🔬 x",
        "Vin\u00adci",
        "a\u200bb",
        "tab\tand\nline",
        "“quoted”",
    ]
    context = " . ".join(pieces)
    dataset = read_squad(squad_file(*[(context, "What?", piece) for piece in pieces]))
    features = squad_features(dataset.examples, tokenizer)
    assert len(features) == len(pieces)
    recovered = [
        features.text(window, int(features.start_positions[window]), int(features.end_positions[window]))
        for window in range(len(features))
    ]
    assert recovered == pieces


def test_an_answer_of_dropped_characters_is_not_trained_on(
    squad_file: Callable[..., Path], tokenizer: Tokenizer
) -> None:
    context = "It is \u200b\u200b here. There."
    dataset = read_squad(squad_file((context, "What?", "\u200b"), (context, "Where?", "here")))
    features = squad_features(dataset.examples, tokenizer)
    assert features.trainable.tolist() == [False, True]
    assert features.start_positions[0] == features.end_positions[0] == 0


def test_questions_without_a_right_offset_are_not_trained_on(
    squad_file: Callable[..., Path], tokenizer: Tokenizer
) -> None:
    path = squad_file(("It is in Europe.", "Where?", [("Europe", 2)]), ("It is in Europe.", "Where?", "Europe"))
    features = squad_features(read_squad(path, on_bad_answer="skip").examples, tokenizer)
    assert features.trainable.tolist() == [False, True]


def test_windows_without_their_answer_can_be_left_out_of_training(
    squad_file: Callable[..., Path], tokenizer: Tokenizer
) -> None:
    context = " ".join(["One thing comes after another."] * 20) + " It is in Europe."
    features = squad_features(
        read_squad(squad_file((context, "Where?", "Europe"))).examples,
        tokenizer,
        max_seq_length=64,
        doc_stride=32,
        max_query_length=16,
    )
    holds = features.start_positions > 0
    assert 0 < holds.sum() < len(features)
    assert features.trainable.all()
    assert features.answered().trainable.tolist() == holds.tolist()


def test_batches_are_padded_to_their_longest(extract: dict[str, SquadDataset], tokenizer: Tokenizer) -> None:
    features = squad_features(extract["test"].examples[:40], tokenizer)
    windows = np.argsort(features.lengths)[:3]
    batch = features.batch(windows)
    longest = int(features.lengths[windows].max())
    assert longest < features.lengths.max()
    assert batch["input_ids"].shape == (3, longest)
    for row, window in enumerate(windows.tolist()):
        begin, end = features.offsets[window : window + 2].tolist()
        assert batch["input_ids"][row].tolist() == features.token_ids[begin:end].tolist() + [PAD] * (
            longest - (end - begin)
        )
        assert batch["attention_mask"][row].tolist() == [i < end - begin for i in range(longest)]
        context_start = int(features.context_start[window])
        assert batch["token_type_ids"][row].tolist() == [int(context_start <= i < end - begin) for i in range(longest)]
        assert batch["start_positions"][row] == features.start_positions[window]
        assert batch["end_positions"][row] == features.end_positions[window]


def test_the_tokenizer_is_left_as_it_was(extract: dict[str, SquadDataset], tokenizer: Tokenizer) -> None:
    """It truncates to 16 tokens and adds special tokens when called directly: neither may show in the features."""
    before = tokenizer.to_str()
    features = squad_features(extract["test"].examples[:5], tokenizer)
    assert tokenizer.to_str() == before
    assert len(tokenizer.encode(features.examples[0].context)) == 16
    assert int(features.lengths.min()) > 16


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_seq_length": 67}, "max_seq_length must be at least max_query_length [+] 4 = 68 .* got 67"),
        ({"doc_stride": 0}, "must be >= 1, got 64 and 0"),
        ({"max_query_length": 0}, "must be >= 1, got 0 and 128"),
    ],
)
def test_lengths_out_of_range(tokenizer: Tokenizer, settings: dict[str, int], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        squad_features([], tokenizer, **settings)


def test_no_questions_make_no_windows(tokenizer: Tokenizer) -> None:
    features = squad_features([], tokenizer)
    assert (len(features), features.token_ids.shape, features.offsets.tolist()) == (0, (0,), [0])


def test_a_vocabulary_without_a_special_token_is_named() -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[CLS]": 1, "[PAD]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match=r"vocabulary has no \[SEP\]; use"):
        squad_features([], tokenizer)
