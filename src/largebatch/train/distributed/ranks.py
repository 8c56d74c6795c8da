"""The ranks of a run: who am I, and what is agreed among all of them."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from largebatch.errors import UserError


def initialize(device: str, timeout_s: float = 600) -> torch.device:
    """Join the process group that `torchrun` describes in the environment, if any, and return this rank's device.

    Args:
        device: "cpu", "cuda" or "auto" (CUDA where there is one).
        timeout_s: a rank that waits longer than this for another one ends with an error.

    Raises:
        UserError: CUDA was asked for and there is none.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device is {device!r}; it must be auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but torch finds no CUDA device; use --device cpu")
    use_cuda = device != "cpu" and torch.cuda.is_available()
    chosen = torch.device("cpu")
    if use_cuda:
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(chosen)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if use_cuda else "gloo", timeout=timedelta(seconds=timeout_s))
    return chosen


def finalize() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's rank, 0 when it is alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_chief() -> bool:
    """Whether this process is the one that writes and prints; known before the process group is there."""
    return int(os.environ.get("RANK", "0")) == 0


def world_size() -> int:
    """The number of processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum `tensor` over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def largest(value: float, device: torch.device) -> float:
    """The largest `value` of any rank."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, device=device, dtype=torch.float64 if device.type == "cpu" else torch.float32)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return float(tensor.item())


def of_chief(value: bool) -> bool:
    """The chief's `value`, on every rank."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()
