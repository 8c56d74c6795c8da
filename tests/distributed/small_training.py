"""A small model, its batches and an engine over them: what one process and many ranks both run."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from largebatch import LAMB, schedules
from largebatch.optim import CPUOffload, optimizer_in_backward
from largebatch.train import Engine, GlobalBatch, Stage, distributed
from largebatch.train.engine import _scale_gradients as scale_gradients
from largebatch.train.engine import global_grad_norm

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


def engine(
    sharding: str = "ddp",
    micro_batch_size: int = 2,
    compression: str = "none",
    max_grad_norm: float | None = 0.2,
    in_backward: bool = False,
    offloaded: bool = False,
) -> Engine:
    torch.manual_seed(0)
    model = Model()
    distributed.shard(model, sharding, compression)
    stages = [Stage("only", STEPS, BATCH, schedules.PolynomialDecay(0.1, STEPS, 2))]
    optimizer: torch.optim.Optimizer = LAMB(model.named_parameters(), lr=1.0)
    return Engine(
        model,
        CPUOffload(optimizer) if offloaded else optimizer,
        stages,
        batches(micro_batch_size),
        loss,
        max_grad_norm=max_grad_norm,
        compression=compression,
        in_backward=in_backward,
    )


class Block(nn.Module):
    """What tensor parallelism cuts: a norm, a layer by its outputs, a layer by its inputs; FSDP2 then cuts 5 rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6)
        with torch.no_grad():
            self.up.weight[:3] *= 20  # no shard is like another
            self.down.weight[:, :3] *= 20

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.norm(x))))


def few_steps(block: nn.Module, forward: Any, clips: bool = True, in_backward: bool = False) -> list[float]:
    """Take steps on one batch, [4, 8, 6], and return the gradients' norms."""
    optimizer = LAMB(block.named_parameters(), lr=0.05)
    handle = optimizer_in_backward(optimizer, with_grad_norm=True) if in_backward else None
    x = torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(1))
    norms = []
    for _ in range(3):
        optimizer.zero_grad()
        forward(x).square().sum().backward()
        norm = handle.grad_norm() if handle else global_grad_norm(list(block.parameters()))
        if clips:
            scale_gradients(list(block.parameters()), 0.1 / norm)
        norms.append(float(norm))
        optimizer.step()
    return norms
