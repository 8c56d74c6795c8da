"""Run by test_training.py: the engine under every sharding on several ranks. Usage: engine_ranks.py FOLDER RANKS"""

import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import small_training
import torch
import torch.distributed as dist
from ranks import Collectives, on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

CASES: dict[str, dict[str, Any]] = {
    "ddp": {"sharding": "ddp"},
    "ddp, one micro-batch": {"sharding": "ddp", "micro_batch_size": 16},
    "fsdp": {"sharding": "fsdp"},
    "fsdp, one micro-batch": {"sharding": "fsdp", "micro_batch_size": 16},
    "hsdp": {"sharding": "hsdp"},
    "hsdp, one micro-batch": {"sharding": "hsdp", "micro_batch_size": 16},
    "ddp in bf16": {"sharding": "ddp", "compression": "bf16"},
    "fsdp in bf16": {"sharding": "fsdp", "compression": "bf16"},
    "ddp, offloaded": {"sharding": "ddp", "offloaded": True},
    "fsdp, offloaded": {"sharding": "fsdp", "offloaded": True},
    "hsdp, offloaded": {"sharding": "hsdp", "offloaded": True},
    "fsdp, in backward": {"sharding": "fsdp", "micro_batch_size": 4, "max_grad_norm": None, "in_backward": True},
    "hsdp, in backward": {"sharding": "hsdp", "micro_batch_size": 4, "max_grad_norm": None, "in_backward": True},
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


@torch.no_grad()
def after_loading(offloaded: bool) -> dict[str, Any]:
    """The weights after two steps, before which others were put into the sharded model, as a checkpoint does."""
    engine = small_training.engine("fsdp", offloaded=offloaded)
    for _, x in zip(range(2), engine.model.parameters(), strict=False):
        x.mul_(2)
    steps = engine.run()
    with torch.enable_grad():
        next(steps), next(steps)
    return {name: whole(x.detach()) for name, x in engine.model.named_parameters()}


def refused() -> str:
    """The optimizer in the backward pass of a model of which every rank has a replica."""
    try:
        next(small_training.engine("ddp", 4, max_grad_norm=None, in_backward=True).run())
    except ValueError as error:
        return str(error)
    return ""


def refused_machines(rank: int) -> str:
    """The hybrid on machines of two, one and one ranks, each of which divides four."""
    with mock.patch.dict(os.environ, LOCAL_WORLD_SIZE="2211"[rank]):
        try:
            small_training.engine("hsdp")
        except ValueError as error:
            return str(error)
    return ""


def whole(x: Any) -> Any:
    return x.full_tensor() if isinstance(x, DTensor) else x


def tensor_parallel(with_fsdp: bool, **settings: bool) -> dict[str, Any]:
    """Three steps of a block under tensor and sequence parallelism, alone or below FSDP2."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    block = small_training.Block()
    plan = {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    }
    parallelize_module(block, mesh["tensor"], plan)
    if with_fsdp:
        fully_shard(block, mesh=mesh["data"])
        block.set_gradient_divide_factor(1.0)
        block.set_force_sum_reduction_for_comms(True)

    def forward(x: Any) -> Any:  # the ranks that share a copy take the same samples, and each a piece of the sequence
        mine = x.chunk(2)[mesh.get_local_rank("data")] if with_fsdp else x
        return block(mine.chunk(2, dim=1)[mesh.get_local_rank("tensor")]).full_tensor()

    with Collectives() as counted:
        norms = small_training.few_steps(block, forward, **settings)
    weights = {name: whole(x.detach()) for name, x in block.named_parameters()}
    return {"norms": norms, "weights": weights, "collectives": dict(counted.counts)}


def body(rank: int) -> dict[str, Any]:
    os.environ["LOCAL_WORLD_SIZE"] = str(dist.get_world_size() // 2)  # two machines
    results = {case: train(**settings) for case, settings in CASES.items()}
    results["refused"] = refused()
    results["refused machines"] = refused_machines(rank)
    results["after loading"] = {str(offloaded): after_loading(offloaded) for offloaded in (False, True)}
    results["tensor parallel"] = tensor_parallel(with_fsdp=False)
    results["tensor parallel and fsdp"] = tensor_parallel(with_fsdp=True)
    results["tensor parallel, in backward"] = tensor_parallel(with_fsdp=False, clips=False, in_backward=True)
    return results


if __name__ == "__main__":
    folder, num_ranks = Path(sys.argv[1]), int(sys.argv[2])
    on_ranks(num_ranks, body, folder, timeout_s=100)
