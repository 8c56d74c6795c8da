"""The ranks of a run: who am I, and what is agreed among all of them."""

import math
import os
import time
import uuid
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
        UserError: CUDA was asked for and there is none, or the time is none to wait.
    """
    if not 0 < timeout_s < math.inf:
        raise UserError(f"timeout_s is {timeout_s}; it must be a number of seconds above 0")
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device is {device!r}; it must be auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but torch finds no CUDA device; use --set device=cpu")
    use_cuda = device != "cpu" and torch.cuda.is_available()
    chosen = torch.device("cpu")
    if use_cuda:
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(chosen)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        backend, timeout = "nccl" if use_cuda else "gloo", timedelta(seconds=timeout_s)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            number, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            store = _store_of_this_start(number, size, timeout)
            where = {"store": store, "rank": number, "world_size": size}
        else:
            where = {}
        dist.init_process_group(backend, timeout=timeout, device_id=chosen if use_cuda else None, **where)
    return chosen


def _store_of_this_start(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Agree on a prefix in torchrun's store that no earlier start of this job has used.

    The store outlives a restart with all that is in it, and a rank that is quick reads there the addresses of processes
    that are gone (pytorch#135712, #167288). So the first rank names the start, and answers every rank under a name that
    only this process can have asked by.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, world_size, is_master=False, timeout=timeout)
    mine = uuid.uuid4().hex
    if rank > 0:
        store.set(f"largebatch/asks/{rank}", mine)
        start = store.get(f"largebatch/answer/{mine}").decode()
        store.set(f"largebatch/{start}/has/{rank}", "")
        return dist.PrefixStore(f"largebatch/{start}", store)
    missing = list(range(1, world_size))
    deadline = time.monotonic() + timeout.total_seconds()
    while missing:
        for other in missing:
            if store.check([f"largebatch/asks/{other}"]):  # perhaps in a voice of the past, which nobody hears answered
                store.set("largebatch/answer/" + store.get(f"largebatch/asks/{other}").decode(), mine)
        missing = [other for other in missing if not store.check([f"largebatch/{mine}/has/{other}"])]
        if missing and time.monotonic() > deadline:
            raise TimeoutError(f"of {world_size} ranks {missing} did not start within {timeout.total_seconds():.0f} s")
        time.sleep(0.01)
    return dist.PrefixStore(f"largebatch/{mine}", store)


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
