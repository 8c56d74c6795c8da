"""Running a model over windows: the logits belong to their tokens whatever the batch, the rank and the padding.

Guards: logits written back to the wrong window after the sort by length, dropout left on, a model left in evaluation
mode, and a rank's part of the windows lost.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tokenizers import Tokenizer

from largebatch.evaluate import (
    SquadDataset,
    SquadFeatures,
    answer_questions,
    evaluate_squad,
    predict,
    squad_features,
    squad_score,
)
from largebatch.models import BertConfig, BertForQuestionAnswering


class Oracle(torch.nn.Module):
    """Gives each token a logit that is a function of its id and position alone, so that misplacing one shows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, 0.001]))

    def forward(
        self, input_ids: torch.Tensor, token_type_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert not torch.is_grad_enabled()
        assert not self.training
        logits = input_ids * self.weight[0] + torch.arange(input_ids.shape[1]) * self.weight[1]
        return logits.masked_fill(~attention_mask, 1e6), -logits + token_type_ids


@pytest.fixture(scope="module")
def features(extract: dict[str, SquadDataset], tokenizer: Tokenizer) -> SquadFeatures:
    return squad_features(
        extract["test"].examples[:30], tokenizer, max_seq_length=128, doc_stride=40, max_query_length=32
    )


@pytest.fixture(scope="module")
def bert() -> BertForQuestionAnswering:
    torch.manual_seed(0)
    return BertForQuestionAnswering(BertConfig.named("tiny", vocab_size=6000, num_hidden_layers=1))


def test_every_logit_belongs_to_its_token(features: SquadFeatures) -> None:
    positions = np.concatenate([np.arange(length) for length in features.lengths])
    types = positions >= np.repeat(features.context_start, features.lengths)
    expected = features.token_ids + np.float32(0.001) * positions.astype(np.float32)
    for batch_size in (1, 7, 1000):
        start, end = predict(Oracle(), features, batch_size=batch_size)
        np.testing.assert_allclose(start, expected, rtol=1e-6)  # one product and one sum in fp32
        np.testing.assert_allclose(end, types - expected, rtol=1e-6)


def test_batch_size_changes_nothing(bert: BertForQuestionAnswering, features: SquadFeatures) -> None:
    """1e-5: matrix products of other shapes add in another order; dropout, were it on, would move logits by 0.1."""
    one = predict(bert, features, batch_size=1)
    many = predict(bert, features, batch_size=64)
    np.testing.assert_allclose(one, many, atol=1e-5)
    assert np.std(one[0]) > 1e-3  # the logits differ from token to token


def test_the_model_is_left_as_it_came(bert: BertForQuestionAnswering, features: SquadFeatures) -> None:
    bert.train()
    bert.bert.embeddings.eval()  # a part frozen by its owner stays frozen
    seen: list[tuple[int, int]] = []
    predict(bert, features, batch_size=32, progress=lambda done, total: seen.append((done, total)))
    assert bert.training
    assert bert.bert.encoder.training
    assert not bert.bert.embeddings.training
    assert seen[-1] == (len(features), len(features))
    assert [done for done, _ in seen] == [*range(32, len(features), 32), len(features)]


def test_mixed_precision_is_near(bert: BertForQuestionAnswering, features: SquadFeatures) -> None:
    exact = predict(bert, features, batch_size=64)[0]
    rounded = predict(bert, features, batch_size=64, autocast="bf16")[0]
    assert rounded.dtype == np.float32
    difference = np.abs(exact - rounded).max()
    assert 0 < difference < 0.05  # bf16 keeps 8 bits of logits of about 1
    with pytest.raises(ValueError, match="autocast must be"):
        predict(bert, features, autocast="fp64")
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        predict(bert, features, batch_size=0)


def test_evaluate_squad_is_the_sum_of_its_parts(
    bert: BertForQuestionAnswering, extract: dict[str, SquadDataset], tokenizer: Tokenizer
) -> None:
    dataset = extract["test"]
    score, predictions = evaluate_squad(bert, dataset, tokenizer, max_seq_length=128, doc_stride=64)
    features = squad_features(dataset.examples, tokenizer, max_seq_length=128, doc_stride=64)
    assert predictions == answer_questions(bert, features)
    assert score == squad_score(dataset, predictions)
    assert score.num_missing == score.num_unknown == 0
    assert set(predictions) == {example.id for example in dataset}
    assert score.exact_match < 20  # a random model does not answer
    contexts = {example.id: example.context for example in dataset}
    assert all(text in contexts[identifier] and text for identifier, text in predictions.items())


def _rank(rank: int, store: str, features: SquadFeatures, expected: list[np.ndarray]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    seen: list[tuple[int, int]] = []
    both = predict(Oracle(), features, batch_size=4, across_ranks=True, progress=lambda *done: seen.append(done))
    assert seen[-1][1] in (len(features) // 2, len(features) - len(features) // 2)  # half of the work
    np.testing.assert_array_equal(both, expected)
    dist.destroy_process_group()


def test_ranks_share_the_windows(features: SquadFeatures, tmp_path: Path) -> None:
    """Each rank runs half of the windows and holds all logits: equality, as a sum with zero is exact."""
    expected = [*predict(Oracle(), features)]
    mp.spawn(_rank, (str(tmp_path / "store"), features, expected), nprocs=2)
