"""The instances have the published statistics, within bounds derived from the number of draws.

Every bound is six standard deviations of the statistic under the published procedure: a right implementation fails
one such check in 5e8, and with these sample sizes a rate off by a few hundredths of its value fails for certain
(`test_the_bounds_would_catch_a_wrong_rate`). All draws are fixed by seeds, so a pass stays a pass.
"""

import math

import numpy as np
import pytest

from largebatch.data import CorpusSplit, PretrainingInstances, Vocabulary
from largebatch.data.packing import form_chunks, target_lengths


def assert_binomial(count: int, n: int, p: float) -> None:
    deviation = (count - n * p) / math.sqrt(n * p * (1 - p))
    assert abs(deviation) <= 6, f"{count} of {n}, expected {p:.4f}: {deviation:.1f} standard deviations"


def assert_uniform(counts: np.ndarray) -> None:
    """Pearson's chi-squared against equal counts: mean k - 1, standard deviation sqrt(2 (k - 1))."""
    expected = counts.sum() / len(counts)
    assert expected >= 20, "too few draws for the approximation"
    chi2 = ((counts - expected) ** 2 / expected).sum()
    degrees = len(counts) - 1
    assert abs(chi2 - degrees) <= 6 * math.sqrt(2 * degrees), f"chi-squared {chi2:.1f} with {degrees} degrees"


@pytest.fixture(scope="module")
def instances(make_split) -> PretrainingInstances:
    split, _ = make_split(2000, 30, 25)
    return PretrainingInstances(split, 128, seed=11)


@pytest.fixture(scope="module")
def batch(instances: PretrainingInstances) -> dict[str, np.ndarray]:
    return instances.batch(0, np.arange(instances.num_instances(0)))


@pytest.fixture(scope="module")
def chunks(instances: PretrainingInstances):
    split, settings = instances.split, instances._settings(0)
    start = instances._epoch_starts(0)
    document = np.searchsorted(split.document_offsets, start, side="right") - 1
    end = split.document_offsets[document + 1]
    return document, form_chunks(split, start, end, target_lengths(document, settings), settings)


def test_number_of_predictions_is_exact(batch) -> None:
    per_instance = np.bincount(batch["masked_positions"] // 128, minlength=len(batch["lengths"]))
    expected = [min(20, max(1, round(0.15 * length))) for length in batch["lengths"].tolist()]
    assert per_instance.tolist() == expected
    assert len(set(expected)) > 10


def test_masked_tokens_are_80_10_10(batch, vocabulary: Vocabulary) -> None:
    """A random word is [MASK] or the token itself once in V each, which adds 0.1 / V to those two shares."""
    seen = batch["input_ids"].reshape(-1)[batch["masked_positions"]]
    n, V = len(seen), len(vocabulary)
    assert n > 50_000
    mask = seen == vocabulary.special_ids["[MASK]"]
    same = seen == batch["masked_labels"]
    assert_binomial(int(mask.sum()), n, 0.8 + 0.1 / V)
    assert_binomial(int(same.sum()), n, 0.1 + 0.1 / V)
    assert_binomial(int((~mask & ~same).sum()), n, 0.1 * (1 - 2 / V))


def test_random_words_are_uniform_over_the_whole_vocabulary(batch, vocabulary: Vocabulary) -> None:
    seen = batch["input_ids"].reshape(-1)[batch["masked_positions"]]
    random = seen[(seen != vocabulary.special_ids["[MASK]"]) & (seen != batch["masked_labels"])]
    counts = np.bincount(random, minlength=len(vocabulary))
    # Left out: [MASK], not told apart from the 80%. [PAD], [UNK], [CLS] and [SEP] are words like any other here.
    assert_uniform(np.delete(counts, vocabulary.special_ids["[MASK]"]))
    assert counts[:4].all()


def test_special_tokens_are_never_predicted(batch, vocabulary: Vocabulary) -> None:
    specials = [vocabulary.special_ids[name] for name in ("[PAD]", "[CLS]", "[SEP]", "[MASK]")]
    assert not np.isin(batch["masked_labels"], specials).any()
    row, column = np.divmod(batch["masked_positions"], 128)
    assert (column > 0).all()
    assert (column < batch["lengths"][row] - 1).all()
    separators = (batch["token_type_ids"] == 0).sum(1, where=np.arange(128) < batch["lengths"][:, None]) - 1
    assert (column != separators[row]).all()


def test_predicted_positions_are_uniform(batch) -> None:
    """In full instances with an equal A, every candidate position is as likely as another."""
    full = np.flatnonzero(batch["lengths"] == 128)
    separator = (batch["token_type_ids"][full] == 0).sum(1) - 1
    row, column = np.divmod(batch["masked_positions"], 128)
    place = np.full(len(batch["lengths"]), -1)
    place[full] = separator
    chosen = place[row] > 0
    # Positions in order, the [SEP] skipped: 125 candidates.
    candidate = column[chosen] - 1 - (column[chosen] > place[row[chosen]])
    assert_uniform(np.bincount(candidate, minlength=125))


def test_next_sentence_is_random_half_of_the_time_and_always_for_one_sentence(batch, chunks) -> None:
    _, chunk = chunks
    single = chunk.end - chunk.start == 1
    labels = batch["next_sentence_labels"]
    assert single.sum() > 100
    assert labels[single].all()
    assert_binomial(int(labels[~single].sum()), int((~single).sum()), 0.5)


def test_unused_sentences_are_put_back(instances, chunks) -> None:
    """Within a document the instances' chunks follow each other, at a_end after a random next, at the end otherwise."""
    document, chunk = chunks
    same_document = document[1:] == document[:-1]
    follows = np.where(chunk.is_random, chunk.a_end, chunk.end)[:-1]
    assert np.array_equal(chunk.start[1:][same_document], follows[same_document])
    first = ~np.concatenate([[False], same_document])
    assert np.array_equal(chunk.start[first], instances.split.document_offsets[:-1])
    last = ~np.concatenate([same_document, [False]])
    assert np.array_equal(np.where(chunk.is_random, chunk.a_end, chunk.end)[last], instances.split.document_offsets[1:])


def test_the_cut_between_a_and_b_is_uniform(chunks) -> None:
    _, chunk = chunks
    num_sentences = chunk.end - chunk.start
    length = 4 + np.bincount(num_sentences)[4:].argmax()
    cut = (chunk.a_end - chunk.start)[num_sentences == length]
    assert cut.min() == 1
    assert cut.max() == length - 1
    assert_uniform(np.bincount(cut - 1, minlength=length - 1))


def test_short_targets(make_split) -> None:
    """One document in ten is short, its target uniform in [2, L - 3]; the others fill the instance."""
    split, _ = make_split(1, 1, 1)
    settings = PretrainingInstances(split, 32, seed=4)._settings(0)
    n = 200_000
    targets = target_lengths(np.arange(n), settings)
    counts = np.bincount(targets, minlength=30)
    assert counts[:2].sum() == 0
    assert len(counts) == 30
    # A short target may be the maximum itself, once in 28.
    assert_binomial(int(counts[29]), n, 0.9 + 0.1 / 28)
    assert_uniform(counts[2:29])


def test_lengths_are_the_targets_where_sentences_allow(vocabulary: Vocabulary) -> None:
    """Sentences of one token reach a target exactly: all instances but a document's last have target + 3 tokens."""
    documents = [[[5 + i % 390] for i in range(200)] for _ in range(3000)]
    split = CorpusSplit.from_documents(documents, vocabulary)
    instances = PretrainingInstances(split, 32, seed=5)
    start = instances._epoch_starts(0)
    document = np.searchsorted(split.document_offsets, start, side="right") - 1
    lengths = instances.segments(0, np.arange(len(start))).lengths
    target = target_lengths(document, instances._settings(0))
    inner = start + target < split.document_offsets[document + 1]
    follows = instances.batch(0, np.arange(len(start)))["next_sentence_labels"] == 0
    assert (inner & follows).sum() > 10_000
    assert np.array_equal(lengths[inner & follows], (target + 3)[inner & follows])
    of_document = lengths[np.searchsorted(start, split.document_offsets[:-1])]
    assert_binomial(int((target_lengths(np.arange(3000), instances._settings(0)) < 29).sum()), 3000, 0.1 * 27 / 28)
    assert of_document.min() < 10


@pytest.mark.parametrize("num_documents", [2, 3])
def test_b_is_from_the_same_document_only_after_ten_tries(vocabulary: Vocabulary, num_documents: int) -> None:
    documents = [[[5 + d] * 3 for _ in range(60_000)] for d in range(num_documents)]
    split = CorpusSplit.from_documents(documents, vocabulary)
    instances = PretrainingInstances(split, 16, seed=6, short_sequence_prob=0.0)
    segments = instances.segments(0, np.arange(instances.num_instances(0)))
    a_document = split.take(segments.a_first)
    b_document = split.take(segments.b_first)
    random = segments.is_random
    assert (a_document[~random] == b_document[~random]).all()
    same = a_document[random] == b_document[random]
    assert_binomial(int(same.sum()), int(random.sum()), num_documents**-10.0)


def test_b_comes_from_every_other_document_and_sentence_alike(vocabulary: Vocabulary) -> None:
    documents = [[[5 + d] * 3 for _ in range(20)] for d in range(300)]
    split = CorpusSplit.from_documents(documents, vocabulary)
    instances = PretrainingInstances(split, 16, seed=7, short_sequence_prob=0.0)
    first = []
    for epoch in range(10):
        segments = instances.segments(epoch, np.arange(instances.num_instances(epoch)))
        random = segments.is_random
        assert (split.take(segments.a_first[random]) != split.take(segments.b_first[random])).all()
        first.append(segments.b_first[random])
    assert_uniform(np.bincount(np.concatenate(first) // 60, minlength=300))
    split_two = CorpusSplit.from_documents([[[5]] * 2, [[6]] * 2], vocabulary)
    starts = PretrainingInstances(split_two, 128, seed=8)
    seen = np.concatenate([starts.segments(e, np.arange(starts.num_instances(e))).b_first for e in range(400)])
    assert set(seen.tolist()) == {0, 1, 2, 3}


def test_truncation_takes_from_both_ends_alike(vocabulary: Vocabulary) -> None:
    """A of 100 tokens and B of 100 at length 64: A loses 69, B 70, each from the front with probability 1/2.

    Coins are thrown per token, so the front's share varies by sqrt(r) / 2 tokens: a coin per instance would vary by
    r / 2, eight times as much.
    """
    documents = [[list(range(5, 105))] * 2 for _ in range(4000)]
    split = CorpusSplit.from_documents(documents, vocabulary)
    instances = PretrainingInstances(split, 64, seed=9, short_sequence_prob=0.0)
    segments = instances.segments(0, np.arange(instances.num_instances(0)))
    assert (segments.a_length == 31).all()
    assert (segments.b_length == 30).all()
    for first, removed in ((segments.a_first, 69), (segments.b_first, 70)):
        front = first % 100
        n = len(front)
        assert_binomial(int(front.sum()), n * removed, 0.5)
        # The sample variance of n binomials has relative standard deviation sqrt(2 / n), nearly.
        assert abs(front.var() / (removed / 4) - 1) < 6 * math.sqrt(2 / n)
    correlation = np.corrcoef(segments.a_first % 100, segments.b_first % 100)[0, 1]
    assert abs(correlation) < 6 / math.sqrt(len(segments.a_first))


def test_whole_words_are_predicted_whole(make_split) -> None:
    """Nearly all of the wanted predictions are made, and no word is predicted in part."""
    split, _ = make_split(500, 30, 25, seed=2)
    instances = PretrainingInstances(split, 128, seed=12, whole_word_masking=True)
    batch = instances.batch(0, np.arange(instances.num_instances(0)))
    wanted = np.minimum(20, np.maximum(1, np.rint(0.15 * batch["lengths"])))
    made = np.bincount(batch["masked_positions"] // 128, minlength=len(wanted))
    assert (made <= wanted).all()
    assert made.sum() > 0.95 * wanted.sum()
    ids = batch["input_ids"].reshape(-1).copy()
    ids[batch["masked_positions"]] = batch["masked_labels"]
    ids = ids.reshape(-1, 128)
    masked = np.zeros(ids.size, dtype=bool)
    masked[batch["masked_positions"]] = True
    masked = masked.reshape(-1, 128)
    # A piece that continues a word and follows its word within a segment shares its fate.
    continues = split.vocabulary.continues_word[ids][:, 1:] & (ids[:, :-1] >= 5)
    assert continues.sum() > 10_000
    assert np.array_equal(masked[:, 1:][continues], masked[:, :-1][continues])


def test_the_bounds_would_catch_a_wrong_rate(batch) -> None:
    n = len(batch["masked_labels"])
    for wrong in (0.79, 0.81):
        with pytest.raises(AssertionError, match="standard deviations"):
            assert_binomial(round(n * wrong), n, 0.8)
