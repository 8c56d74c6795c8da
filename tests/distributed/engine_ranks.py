"""Run by test_training.py: the engine under every sharding on several ranks. Usage: engine_ranks.py FOLDER RANKS"""

import os
import sys
from pathlib import Path
from typing import Any

import small_training
import torch.distributed as dist
from ranks import Collectives, on_ranks
from torch.distributed.tensor import DTensor

CASES: dict[str, dict[str, Any]] = {
    "ddp": {"sharding": "ddp"},
    "ddp, one micro-batch": {"sharding": "ddp", "micro_batch_size": 16},
    "fsdp": {"sharding": "fsdp"},
    "fsdp, one micro-batch": {"sharding": "fsdp", "micro_batch_size": 16},
    "hsdp": {"sharding": "hsdp"},
    "hsdp, one micro-batch": {"sharding": "hsdp", "micro_batch_size": 16},
    "ddp in bf16": {"sharding": "ddp", "compression": "bf16"},
    "fsdp in bf16": {"sharding": "fsdp", "compression": "bf16"},
}


def train(**settings: Any) -> dict[str, Any]:
    engine = small_training.engine(**settings)
    results, counts = [], {}
    steps = engine.run()
    for number in range(small_training.STEPS):
        with Collectives() as counted:
            results.append(next(steps))
        if number == 3:  # not the first, in which DDP finds its buckets
            counts = dict(counted.counts)
    return {
        "losses": [result.metrics["loss"] for result in results],
        "norms": [result.grad_norm for result in results],
        "clipped": [result.clipped for result in results],
        "weights": {name: whole(x.detach()) for name, x in engine.model.named_parameters()},
        "collectives": counts,
    }


def whole(x: Any) -> Any:
    return x.full_tensor() if isinstance(x, DTensor) else x


def body(rank: int) -> dict[str, Any]:
    os.environ["LOCAL_WORLD_SIZE"] = str(dist.get_world_size() // 2)  # two machines
    return {case: train(**settings) for case, settings in CASES.items()}


if __name__ == "__main__":
    folder, num_ranks = Path(sys.argv[1]), int(sys.argv[2])
    on_ranks(num_ranks, body, folder, timeout_s=100)
