"""A small BERT pre-training run with dropout, and what it left: on one process by import, on many by running this file.

Usage: whole_runs.py FOLDER CASES; the cases are a JSON list of the arguments of `train`, each with "ranks".
"""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from largebatch.experiments.config import override
from largebatch.experiments.recipes import get
from largebatch.experiments.runner import Interrupted, run
from largebatch.train import StepResult, checkpoint, distributed

SETTINGS = [
    "optim.lr=1e-2",
    "stages.0.sequence_length=32",
    "stages.0.batch_size=16",
    "stages.0.micro_batch_size=16",
    "stages.0.steps=40",
    "stages.0.warmup_steps=5",
    "stages.1.sequence_length=64",
    "stages.1.batch_size=8",
    "stages.1.micro_batch_size=8",
    "stages.1.steps=10",
    "stages.1.warmup_steps=2",
    "data.evaluation_sequences=16",
    "checkpoint_every=20",
    "keep_checkpoints=9",
    "timeout_s=60",
    "device=cpu",
    "precision=fp32",  # runs are compared to 1e-5, on processors with bfloat16 units too
]


def settings(corpus: Path, *more: str) -> list[str]:
    return [*SETTINGS, f"data.path={corpus}", *more]


def train(out: Path, chosen: list[str], resume: bool = False, recipe: str = "bert-tiny", stop_after: int = 0) -> None:
    """Run a recipe; after the step ``stop_after`` the second rank is asked to stop."""

    def on_step(result: StepResult, num_steps: int) -> None:
        if result.step == stop_after and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with contextlib.suppress(Interrupted):
        run(override(get(recipe), chosen), out, resume=resume, on_step=on_step)


def metrics(out: Path, event: str = "step") -> list[dict[str, Any]]:
    """The events of one kind in a run's metrics."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def final_weights(out: Path) -> dict[str, Any]:
    found = checkpoint.latest(out / "checkpoints")
    assert found is not None
    return checkpoint.load_weights(found)


if __name__ == "__main__":
    from ranks import on_ranks

    os.environ["LOCAL_WORLD_SIZE"] = "2"  # four ranks are two machines
    folder = Path(sys.argv[1])
    for number, case in enumerate(json.loads(sys.argv[2])):
        ranks, case["out"] = case.pop("ranks"), Path(case["out"])
        on_ranks(ranks, lambda rank, case=case: train(**case), folder / str(number), 240)
