"""FLOPs are those that PyTorch counts for the model it runs, and those published for BERT-large.

Guards the denominator of every MFU we print. The counts are exact integers: no tolerance.
"""

from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from largebatch.models import BertConfig, BertForPreTraining, pretraining_loss, training_flops
from largebatch.models.flops import lenet_training_flops
from largebatch.models.vision import LeNet


@pytest.mark.parametrize(("length", "num_masked", "gflop"), [(128, 20, 240.6), (512, 80, 1020.5)])
def test_bert_large_by_the_published_arithmetic(length: int, num_masked: int, gflop: float) -> None:
    assert round(training_flops(BertConfig.named("large"), [length], num_masked) / 1e9, 1) == gflop


@pytest.mark.parametrize("lengths", [[17, 5, 31, 1, 31, 8], [16, 16]])
def test_bert_by_pytorchs_counter(lengths: list[int], small_config: BertConfig, make_batch: Callable) -> None:
    """Padding costs nothing. The attention is the unfused one: the fused one's recomputation would be counted too."""
    model = BertForPreTraining(small_config)
    batch = make_batch(lengths, 40)
    totals = {"masked": torch.tensor(1), "sequences": torch.tensor(1)}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        pretraining_loss(model, batch, totals)[0].backward()
    width = small_config.hidden_size
    pooler_and_next_sentence = 6 * len(lengths) * (width * width + width * 2)
    counts = {"config": small_config, "lengths": lengths, "num_masked": len(batch["masked_positions"])}
    expected = training_flops(**counts, whole_layers=False) + pooler_and_next_sentence
    assert counter.get_total_flops() == expected
    rows_unseen = sum(lengths) - counts["num_masked"] - len(lengths)
    per_row = 6 * (width**2 + 2 * width * small_config.intermediate_size)
    assert training_flops(**counts) - training_flops(**counts, whole_layers=False) == rows_unseen * per_row


def test_what_is_left_out_is_small() -> None:
    for name in ("tiny", "base", "large"):
        config = BertConfig.named(name)
        left_out = 6 * (config.hidden_size**2 + 2 * config.hidden_size)
        assert left_out < 5e-4 * training_flops(config, [128], 20)


def test_each_argument_counts(small_config: BertConfig) -> None:
    base = training_flops(small_config, [10, 20], 3)
    assert training_flops(small_config, [10, 20], 4) - base == 6 * (48 * 48 + 48 * 211)
    # the same number of tokens: attention alone differs
    assert training_flops(small_config, [15, 15], 3) - base == 6 * 3 * 2 * 48 * (2 * 15**2 - 10**2 - 20**2)
    assert training_flops(small_config, [], 0) == 0


def test_lenet_by_pytorchs_counter() -> None:
    model = LeNet()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(3, 1, 28, 28)).sum().backward()
    assert counter.get_total_flops() == lenet_training_flops(3)
