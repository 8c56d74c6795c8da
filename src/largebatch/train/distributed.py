"""The ranks of a run: who am I, and sums over everybody. One process is the degenerate case, with no communication.

With `optim/norms.py` the only code that touches `torch.distributed`.
"""

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from largebatch.errors import UserError

# All gradients travel in buckets of this many bytes: large enough that latency does not count, small enough that the
# copy is no second set of gradients.
_BUCKET_BYTES = 64 * 2**20


def initialize(device: str) -> torch.device:
    """Join the process group that `torchrun` describes in the environment, if any, and return this rank's device.

    Args:
        device: "cpu", "cuda" or "auto" (CUDA where there is one).

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
        dist.init_process_group("nccl" if use_cuda else "gloo")
    return chosen


def finalize() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's rank, 0 when it is alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum `tensor` over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def smallest(value: int, device: torch.device) -> int:
    """The smallest `value` of any rank."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MIN)
    return int(tensor.item())


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Sum every gradient over all ranks, in place, in as few collectives as buckets.

    The engine's losses are normalised over the global batch, so the sum is the gradient of the global mean. A
    parameter without a gradient on this rank counts as zero, so that all ranks make the same calls.
    """
    if world_size() == 1:
        return
    bucket: list[Tensor] = []
    bucket_bytes = 0
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        grad = parameter.grad
        if bucket and (bucket_bytes + grad.nbytes > _BUCKET_BYTES or grad.dtype != bucket[0].dtype):
            _sum_bucket(bucket)
            bucket, bucket_bytes = [], 0
        bucket.append(grad)
        bucket_bytes += grad.nbytes
    if bucket:
        _sum_bucket(bucket)


def _sum_bucket(bucket: list[Tensor]) -> None:
    flat = torch.cat([grad.reshape(-1) for grad in bucket])
    dist.all_reduce(flat)
    for grad, total in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
        grad.copy_(total.view_as(grad))


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()
