"""The estimate of a training step's memory against real steps: tensors alive at once, and what a process grows by.

The bound of 15% is the claim that the estimate makes. It leaves room for what is left out: ids, LayerNorm's statistics,
transients of single operations.
"""

import dataclasses
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from largebatch import LAMB
from largebatch.models import BertConfig, BertForPreTraining, pretraining_loss, training_memory
from largebatch.models.memory import MemoryEstimate, num_parameters

STEPS = """
from tests.models.test_memory import two_steps
from largebatch.bench.timing import peak_extra_bytes
from largebatch.models import BertConfig
import torch
torch.mm(torch.ones(300, 300), torch.ones(300, 300))  # loads what all products need
print(peak_extra_bytes(lambda: two_steps(BertConfig.named({name!r}), {sequences}, {length}), torch.device("cpu")))
"""


def two_steps(config: BertConfig, sequences: int, length: int, *, checkpoint_layers: bool = False) -> None:
    """Two steps of LAMB with two micro-batches each, so that state and gradients are there when activations are."""
    model = BertForPreTraining(config, checkpoint_layers=checkpoint_layers).train()
    optimizer = LAMB(model.parameters(), lr=1e-3)
    num_masked = round(0.15 * length)
    positions = (torch.arange(sequences)[:, None] * length + 1 + torch.arange(num_masked)).reshape(-1)
    batch = {
        "input_ids": torch.randint(5, config.vocab_size, (sequences, length)),
        "token_type_ids": torch.zeros(sequences, length, dtype=torch.int64),
        "attention_mask": torch.ones(sequences, length, dtype=torch.bool),
        "masked_positions": positions,
        "masked_labels": torch.zeros_like(positions),
        "next_sentence_labels": torch.zeros(sequences, dtype=torch.int64),
        "dropout_keys": torch.arange(sequences),
    }
    totals = {"masked": torch.tensor(2 * len(positions)), "sequences": torch.tensor(2 * sequences)}
    for _ in range(2):
        for _ in range(2):
            pretraining_loss(model, batch, totals)[0].backward()
        optimizer.step()
        optimizer.zero_grad()


def peak_of_tensors(work: Callable[[], object]) -> int:
    """The most bytes that tensors hold at once, by the profiler's record of every allocation and release."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def estimate(config: BertConfig, sequences: int, length: int, **settings: bool) -> MemoryEstimate:
    return training_memory(config, sequences, length, sequences * round(0.15 * length), **settings)


@pytest.mark.parametrize(
    ("name", "changes", "sequences", "length"),
    [
        ("mini", {}, 8, 128),
        pytest.param("mini", {}, 2, 512, marks=pytest.mark.slow),
        ("mini", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}, 8, 128),
        pytest.param("small", {}, 8, 128, marks=pytest.mark.slow),
        pytest.param("base", {}, 4, 128, marks=pytest.mark.slow),
        pytest.param("base", {}, 1, 512, marks=pytest.mark.slow),
    ],
)
def test_tensors_of_a_step(name: str, changes: dict[str, float], sequences: int, length: int) -> None:
    config = dataclasses.replace(BertConfig.named(name), **changes)
    measured = peak_of_tensors(lambda: two_steps(config, sequences, length))
    assert measured == pytest.approx(estimate(config, sequences, length).total, rel=0.15)


@pytest.mark.slow
def test_tensors_of_a_step_with_layers_computed_again() -> None:
    """Few words and many layers, so that activations are most of the memory, and the two estimates far apart."""
    config = dataclasses.replace(BertConfig.named("mini", vocab_size=1000), num_hidden_layers=8)
    whole, frugal = estimate(config, 16, 128).total, estimate(config, 16, 128, checkpoint_layers=True).total
    assert frugal < 0.6 * whole
    measured = peak_of_tensors(lambda: two_steps(config, 16, 128, checkpoint_layers=True))
    assert measured == pytest.approx(frugal, rel=0.15)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel")
def test_a_process_that_trains_bert_large() -> None:
    """What the kernel says that a process has grown by: libraries and the allocator's gaps are in it."""
    program = STEPS.format(name="large", sequences=2, length=128)
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    if output.strip() == "None":
        pytest.skip("this system does not tell the peak of resident memory")
    assert int(output) == pytest.approx(estimate(BertConfig.named("large"), 2, 128).total, rel=0.15)


@pytest.mark.parametrize("name", ["tiny", "base"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_number_of_parameters(name: str, tied: bool) -> None:
    config = dataclasses.replace(BertConfig.named(name), tie_word_embeddings=tied)
    with torch.device("meta"):
        model = BertForPreTraining(config)
    model.tie_weights()
    assert num_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


def test_it_reads_as_a_line() -> None:
    text = str(estimate(BertConfig.named("large"), 2, 128))
    assert "GB at the peak (weights 1.34 GB, gradients 1.34 GB, optimizer 2.69 GB" in text
