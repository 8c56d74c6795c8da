"""The same run on a CUDA device: bfloat16, a micro-batch found by a probe, and losses close to the CPU's."""

import json
from pathlib import Path

import pytest
import torch

from largebatch.experiments.runner import run

from .conftest import small_bert

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def losses(run_directory: Path) -> list[float]:
    events = [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
    return [event["loss"] for event in events if event["event"] == "step"]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 2e-2)])
def test_a_run_on_cuda_follows_the_run_on_the_cpu(corpus: Path, tmp_path: Path, precision, tolerance):
    still = ("model.hidden_dropout=0", "model.attention_dropout=0")
    run(small_bert(corpus, *still), tmp_path / "cpu")
    cuda = ("device=cuda", f"precision={precision}", "stages.0.micro_batch_size=none")
    run(small_bert(corpus, *still, *cuda), tmp_path / "cuda")
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), rel=tolerance)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_run_with_dropout_learns(corpus: Path, tmp_path: Path, compiled: bool):
    """Packed attention with dropout, and inductor's kernels, forward and backward: the loss falls as on the CPU."""
    run(small_bert(corpus), tmp_path / "cpu")
    cuda = ("device=cuda", "precision=bf16", f"compile={str(compiled).lower()}")
    run(small_bert(corpus, *cuda), tmp_path / "cuda")
    on_cpu, on_cuda = losses(tmp_path / "cpu"), losses(tmp_path / "cuda")
    assert on_cpu[-1] < on_cpu[0], "too few steps to tell"
    assert on_cuda[-1] == pytest.approx(on_cpu[-1], rel=0.1)
