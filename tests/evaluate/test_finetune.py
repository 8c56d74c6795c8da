"""Fine-tuning batches: each window once an epoch, the same again after a resume, the same gradient however cut.

Guards: windows dropped at the end of an epoch or by the deal to ranks, a shuffle that repeats, labels that part from
their windows in the sort by length, and training on questions whose answer is not where the file says.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from largebatch.errors import UserError
from largebatch.evaluate import (
    FinetuneSettings,
    SquadDataset,
    SquadFeatures,
    answer_questions,
    read_squad,
    squad_batches,
    squad_features,
    squad_score,
)
from largebatch.models import BertConfig, BertForQuestionAnswering, question_answering_loss
from largebatch.train import Engine, GlobalBatch, Stage, distributed


@pytest.fixture(scope="module")
def features(extract: dict[str, SquadDataset], tokenizer: Tokenizer) -> SquadFeatures:
    return squad_features(extract["train"].examples[:100], tokenizer, max_seq_length=128, doc_stride=64)


def take(batches: Callable, count: int, stage: int = 0, cursor: dict[str, int] | None = None) -> list[GlobalBatch]:
    stream = batches(stage, cursor)
    return [next(stream) for _ in range(count)]


def rows(batch: GlobalBatch) -> list[tuple]:
    """Each window of a batch as (ids, first and last token of the answer), without padding."""
    return [
        (*ids[mask].tolist(), "answer", int(start), int(end))
        for micro in batch.micro_batches
        for ids, mask, start, end in zip(
            micro["input_ids"], micro["attention_mask"], micro["start_positions"], micro["end_positions"], strict=True
        )
    ]


def windows(features: SquadFeatures) -> list[tuple]:
    return [
        (
            *features.token_ids[features.offsets[w] : features.offsets[w + 1]].tolist(),
            "answer",
            int(features.start_positions[w]),
            int(features.end_positions[w]),
        )
        for w in range(len(features))
    ]


@pytest.mark.parametrize("size", [1, 7, 32])
def test_an_epoch_is_every_window_once(features: SquadFeatures, size: int) -> None:
    """After any number of batches no window was seen more than once more often than another."""
    expected = Counter(windows(features))
    seen: Counter[tuple] = Counter()
    for batch in take(squad_batches(features, batch_size=size, seed=1), 3 * len(features) // size):
        seen.update(rows(batch))
        complete = seen.total() // len(features)
        assert all(complete * n <= seen[row] <= (complete + 1) * n for row, n in expected.items())
    assert complete >= 2
    assert set(seen) == set(expected)


def test_one_batch_of_all_windows_is_an_epoch(features: SquadFeatures) -> None:
    batches = take(squad_batches(features, batch_size=len(features)), 2)
    for number, batch in enumerate(batches):
        assert sorted(rows(batch)) == sorted(windows(features))
        assert batch.cursor == {"epoch": number + 1, "position": 0}
        assert batch.totals == {"sequences": len(features)}
        assert (batch.num_sequences, batch.num_tokens) == (len(features), len(features.token_ids))


def test_order_is_a_function_of_seed_and_epoch(features: SquadFeatures) -> None:
    first, second = (take(squad_batches(features, seed=5), 6) for _ in range(2))
    assert [rows(a) for a in first] == [rows(b) for b in second]
    other = take(squad_batches(features, seed=6), 6)
    assert [rows(a) for a in first] != [rows(b) for b in other]
    num = len(features)
    epochs = take(squad_batches(features, batch_size=num // 2), 4)
    assert sorted(rows(epochs[0])) != sorted(rows(epochs[2]))


def test_resuming_is_not_having_stopped(features: SquadFeatures) -> None:
    """From every cursor of more than two epochs, batches across an epoch's end included."""
    batches = squad_batches(features, batch_size=len(features) // 4 + 3, micro_batch_size=20)
    whole = take(batches, 9)
    assert {batch.cursor["epoch"] for batch in whole} >= {0, 1, 2}
    for stop in range(1, 9):
        resumed = take(batches, 9 - stop, cursor=whole[stop - 1].cursor)
        assert [rows(a) for a in resumed] == [rows(b) for b in whole[stop:]]
        assert [a.cursor for a in resumed] == [b.cursor for b in whole[stop:]]


def test_ranks_take_the_global_batch_apart(features: SquadFeatures, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together the same windows as one process, a batch that they do not divide included, and nearly equal work."""
    alone = take(squad_batches(features, batch_size=31), 5)
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    parts = []
    for rank in range(4):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(take(squad_batches(features, batch_size=31), 5))
    for step, whole in enumerate(alone):
        together = [part[step] for part in parts]
        assert sorted(row for part in together for row in rows(part)) == sorted(rows(whole))
        assert sum(part.totals["sequences"] for part in together) == 31
        assert sum(part.num_tokens for part in together) == whole.num_tokens
        assert {str(part.cursor) for part in together} == {str(whole.cursor)}
        sizes = [part.num_sequences for part in together]
        assert max(sizes) - min(sizes) == 1
    with pytest.raises(ValueError, match=r"at least the number of ranks \(4\), got 3"):
        squad_batches(features, batch_size=3)


def test_micro_batches_hold_windows_of_like_length(features: SquadFeatures) -> None:
    """Cells of padding fall by more than half against the same windows cut unsorted."""
    batch = take(squad_batches(features, batch_size=96, micro_batch_size=8), 1)[0]
    assert [len(micro["input_ids"]) for micro in batch.micro_batches] == [8] * 12
    cells = sum(micro["input_ids"].numel() for micro in batch.micro_batches)
    lengths = np.concatenate([micro["attention_mask"].sum(1) for micro in batch.micro_batches])
    assert lengths.sum() == batch.num_tokens
    unsorted = np.random.default_rng(0).permutation(lengths).reshape(12, 8).max(axis=1).sum() * 8
    assert cells - batch.num_tokens < 0.5 * (unsorted - batch.num_tokens)
    for micro in batch.micro_batches:
        assert micro["input_ids"].shape[1] == micro["attention_mask"].sum(1).max()


def test_the_gradient_does_not_depend_on_the_micro_batch(features: SquadFeatures) -> None:
    """1e-6 of the largest entry: in float64 but for the logits, which the loss rounds to fp32 (6e-8 each)."""
    torch.manual_seed(0)
    model = BertForQuestionAnswering(BertConfig.named("tiny", vocab_size=6000, num_hidden_layers=1)).double().eval()

    def gradient(size: int | None) -> torch.Tensor:
        batch = take(squad_batches(features, batch_size=24, micro_batch_size=size), 1)[0]
        totals = {name: torch.tensor(float(value)) for name, value in batch.totals.items()}
        model.zero_grad()
        for micro in batch.micro_batches:
            question_answering_loss(model, micro, totals)[0].backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole = gradient(None)
    for size in (1, 7, 24):
        assert (gradient(size) - whole).abs().max() <= 1e-6 * whole.abs().max()
    assert whole.abs().max() > 1e-3
    part = next(squad_batches(features, batch_size=12)(0, None))  # other windows, another gradient
    model.zero_grad()
    question_answering_loss(model, part.micro_batches[0], {"sequences": torch.tensor(12.0)})[0].backward()
    other = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (other - whole).abs().max() > 0.01 * whole.abs().max()


def test_flops_see_the_lengths_of_this_part(features: SquadFeatures) -> None:
    batch = take(squad_batches(features, batch_size=16, flops=lambda lengths: 3.0 * (lengths**2).sum()), 1)[0]
    lengths = np.concatenate([micro["attention_mask"].sum(1) for micro in batch.micro_batches])
    assert batch.flops == 3 * (lengths**2).sum()
    assert take(squad_batches(features), 1)[0].flops == 0


def test_stages_have_their_own_batch_size(features: SquadFeatures) -> None:
    batches = squad_batches(features, batch_size=(24, 8))
    assert [take(batches, 1, stage)[0].num_sequences for stage in (0, 1)] == [24, 8]


def test_questions_that_cannot_be_trained_on_are_left_out(
    squad_file: Callable[..., Path], tokenizer: Tokenizer
) -> None:
    bad = ("It is in Europe.", "Where?", [("Europe", 2)])
    path = squad_file(bad, ("It is in Asia.", "Where?", "Asia"), bad)
    features = squad_features(read_squad(path, on_bad_answer="skip").examples, tokenizer)
    seen = {row for batch in take(squad_batches(features, batch_size=2), 4) for row in rows(batch)}
    assert seen == {windows(features)[1]}
    hopeless = squad_features(read_squad(squad_file(bad), on_bad_answer="skip").examples, tokenizer)
    with pytest.raises(UserError, match=r"nothing to train on; check"):
        squad_batches(hopeless)


def test_wrong_sizes(features: SquadFeatures) -> None:
    for size in (0, []):
        with pytest.raises(ValueError, match="batch_size must be at least"):
            squad_batches(features, batch_size=size)
    with pytest.raises(ValueError, match="micro_batch_size must be >= 1, got 0"):
        squad_batches(features, micro_batch_size=0)


def test_settings_are_the_published_ones() -> None:
    """Devlin et al.: batch 32, 3e-5 to 5e-5, 2 to 3 epochs, warm-up 10%. The LAMB authors' code: 3e-4 at batch 64."""
    settings = FinetuneSettings()
    assert (settings.optimizer, settings.learning_rate, settings.batch_size, settings.epochs) == ("adamw", 3e-5, 32, 2)
    assert (settings.steps(100_000), settings.warmup_steps(100_000)) == (6250, 625)
    lamb = FinetuneSettings.lamb()
    assert (lamb.optimizer, lamb.learning_rate, lamb.batch_size, lamb.warmup) == ("lamb", 3e-4, 64, 0.1)
    assert settings.steps(1) == 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"optimizer": "adam"}, "optimizer must be 'adamw' or 'lamb', got 'adam'"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0, got 0.0"),
        ({"batch_size": 0}, "batch_size must be > 0, got 0"),
        ({"epochs": -1}, "epochs must be > 0, got -1"),
        ({"warmup": 1.0}, r"warmup must be in \[0, 1\), got 1.0"),
    ],
)
def test_settings_out_of_range(change: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        FinetuneSettings(**change)


def test_a_small_model_learns_its_questions_through_the_engine(
    extract: dict[str, SquadDataset], tokenizer: Tokenizer
) -> None:
    """The whole path: file, windows, batches, engine, logits, spans, score. Chance is below 10% exact match."""
    examples = sorted(extract["train"].examples, key=lambda e: len(e.context))[:24]
    features = squad_features(examples, tokenizer, max_seq_length=160, max_query_length=40)
    torch.manual_seed(0)
    model = BertForQuestionAnswering(
        BertConfig.named(
            "tiny",
            vocab_size=6000,
            num_hidden_layers=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    before = squad_score(examples, answer_questions(model, features))
    engine = Engine(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), weight_decay=0.0),
        stages=[Stage("squad", steps=80, batch_size=24, learning_rate=lambda step: 3e-3 * (1 - step / 80))],
        batches=squad_batches(features, batch_size=24, micro_batch_size=12),
        loss=question_answering_loss,
    )
    losses = [result.metrics["loss"] for result in engine.run()]
    after = squad_score(examples, answer_questions(model, features))
    assert before.exact_match < 10
    assert losses[-1] < 0.2 * losses[0]
    assert after.exact_match > 80
    assert after.f1 > 80
