"""The same run on a CUDA device: bfloat16, a micro-batch found by a probe, and losses close to the CPU's."""

import json
from pathlib import Path
from statistics import fmean

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
def test_a_run_with_dropout_learns_as_on_the_cpu(corpus: Path, tmp_path: Path, compiled: bool):
    """Packed attention with dropout, and inductor's kernels, there and back. Other masks move the mean by some 0.3%."""
    longer = "stages.0.steps=60"
    run(small_bert(corpus, longer), tmp_path / "cpu")
    cuda = ("device=cuda", "precision=bf16", f"compile={str(compiled).lower()}")
    run(small_bert(corpus, longer, *cuda), tmp_path / "cuda")
    on_cpu, on_cuda = (fmean(losses(tmp_path / where)[40:60]) for where in ("cpu", "cuda"))
    assert on_cpu < 0.93 * losses(tmp_path / "cpu")[0], "too few steps to tell"
    assert on_cuda == pytest.approx(on_cpu, rel=2e-2)
