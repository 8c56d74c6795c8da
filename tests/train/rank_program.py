"""Run by torchrun in test_distributed.py: trains a few steps on this rank's share, and prints losses and weights."""

import json
import sys
from pathlib import Path

import torch
from torch import nn

from largebatch import LAMB, schedules
from largebatch.train import Engine, GlobalBatch, Stage, distributed

BATCH = 8


def loss(model, micro_batch, totals):
    losses = nn.functional.cross_entropy(model(micro_batch["x"]), micro_batch["y"], reduction="none")
    return (losses * micro_batch["weight"]).sum() / totals["weighted"], {}


def batches(stage, cursor):
    rank, size = distributed.rank(), BATCH // distributed.world_size()
    for number in range(6):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(BATCH, 5, generator=generator)[rank * size : (rank + 1) * size]
        y = torch.randint(3, (BATCH,), generator=generator)[rank * size : (rank + 1) * size]
        # The ranks have unequal weights, so a mean of their means would be wrong.
        weight = (torch.arange(BATCH) % 8 < 5).float()[rank * size : (rank + 1) * size]
        totals = {"weighted": int(weight.sum())}
        yield GlobalBatch([{"x": x, "y": y, "weight": weight}], totals, size, size, 1.0, {"batch": number + 1})


def main(out: Path) -> None:
    distributed.initialize("cpu")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3))
    stages = [Stage("only", 6, BATCH, schedules.PolynomialDecay(0.1, 6, 2))]
    engine = Engine(model, LAMB(model.parameters(), lr=1.0), stages, batches, loss, max_grad_norm=0.2)
    results = list(engine.run())
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    content = {
        "losses": [result.metrics["loss"] for result in results],
        "norms": [result.grad_norm for result in results],
        "samples": engine.progress.samples,
        "weights": flat.tolist(),
    }
    (out / f"rank{distributed.rank()}.json").write_text(json.dumps(content))
    distributed.finalize()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
