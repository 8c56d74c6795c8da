"""A small model, its batches and an engine over them: what one process and many ranks both run."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from largebatch import LAMB, schedules
from largebatch.train import Engine, GlobalBatch, Stage, distributed

BATCH, STEPS = 16, 6


class Model(nn.Module):
    """Layers of odd sizes around two blocks in a `ModuleList`, as a transformer has them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 9)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Tanh(), nn.Linear(9, 9)) for _ in range(2))
        self.last = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


def loss(model: nn.Module, micro_batch: Mapping[str, Tensor], totals: Mapping[str, Tensor]) -> tuple[Tensor, dict]:
    losses = nn.functional.cross_entropy(model(micro_batch["x"]), micro_batch["y"], reduction="none")
    return (losses * micro_batch["weight"]).sum() / totals["weighted"], {}


def batches(micro_batch_size: int) -> Any:
    def of_stage(stage: int, cursor: Any) -> Iterator[GlobalBatch]:
        size = BATCH // distributed.world_size()
        mine = slice(distributed.rank() * size, (distributed.rank() + 1) * size)
        for number in range(STEPS):
            generator = torch.Generator().manual_seed(number)
            arrays = {
                "x": torch.randn(BATCH, 5, generator=generator)[mine],
                "y": torch.randint(3, (BATCH,), generator=generator)[mine],
                # The ranks have unequal weights, so a mean of their means would be wrong.
                "weight": (torch.arange(BATCH) % BATCH < 11).float()[mine],
            }
            cuts = [
                dict(zip(arrays, part, strict=True))
                for part in zip(*(a.split(micro_batch_size) for a in arrays.values()), strict=True)
            ]
            totals = {"weighted": int(arrays["weight"].sum())}
            yield GlobalBatch(cuts, totals, size, size, 1.0, {"batch": number + 1})

    return of_stage


def engine(sharding: str = "ddp", micro_batch_size: int = 2, compression: str = "none") -> Engine:
    torch.manual_seed(0)
    model = Model()
    distributed.shard(model, sharding, compression)
    stages = [Stage("only", STEPS, BATCH, schedules.PolynomialDecay(0.1, STEPS, 2))]
    optimizer = LAMB(model.named_parameters(), lr=1.0)
    return Engine(model, optimizer, stages, batches(micro_batch_size), loss, max_grad_norm=0.2, compression=compression)
