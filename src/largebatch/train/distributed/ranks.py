"""The ranks of a run: who am I, and what is agreed among all of them."""

import math
import os
import time
import uuid
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from largebatch.errors import UserError

# Longer than the ranks of a machine are apart when they come to the same mistake.
_FIRST_RANK_WAIT_S = 5.0


def initialize(device: str, timeout_s: float = 600) -> torch.device:
    """Join the process group that `torchrun` describes in the environment, if any, and return this rank's device.

    Args:
        device: "cpu", "cuda" or "auto" (CUDA where there is one).
        timeout_s: a rank that waits longer than this for another one ends with an error.

    Raises:
        UserError: CUDA was asked for and there is none, the time is none to wait, the environment is not as torchrun
            makes it, or other ranks do not come.
    """
    if not 0 < timeout_s < math.inf:
        raise UserError(f"timeout_s is {timeout_s}; it must be a number of seconds above 0")
    number, size = _place()
    chosen = choose_device(device, exported("LOCAL_RANK", 0) if size > 1 else 0)
    if size > 1 and not dist.is_initialized():
        _join(number, size, chosen, timedelta(seconds=timeout_s))
    return chosen


def choose_device(device: str, index: int = 0) -> torch.device:
    """Return the device to compute on and join nothing, for what works alone whatever the environment tells of.

    Args:
        device: "cpu", "cuda" or "auto" (CUDA where there is one).
        index: of the GPU, where there are several.

    Raises:
        UserError: an unknown name, or CUDA was asked for and there is none.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device is {device!r}; it must be auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but torch finds no CUDA device; use --set device=cpu")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    chosen = torch.device("cuda", index)
    torch.cuda.set_device(chosen)
    return chosen


def exported(name: str, default: int) -> int:
    """The number that the launcher exports under a name; `default` where there is none, or nothing in it.

    Raises:
        UserError: it is no whole number.
    """
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise UserError(f"{name} is {text!r} in the environment; it must be a whole number: start with torchrun")
    return int(text)


def _place() -> tuple[int, int]:
    """This process's rank and the number of ranks that the environment tells of; a rank alone is the first."""
    size = exported("WORLD_SIZE", 1)
    if size <= 1:
        return 0, 1
    _require("RANK", size)
    number = exported("RANK", 0)
    if number >= size:
        raise UserError(f"RANK is {number} with WORLD_SIZE {size}; it must be 0 to {size - 1}: start with torchrun")
    return number, size


def _require(name: str, size: int) -> None:
    if not os.environ.get(name):
        raise UserError(f"WORLD_SIZE is {size} but {name} is not set; start with torchrun, or unset WORLD_SIZE")


def _join(number: int, size: int, device: torch.device, timeout: timedelta) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        _require(name, size)
    exported("MASTER_PORT", 0)
    backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    where: dict[str, Any] = {}
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            where = {"store": _store_of_this_start(number, size, timeout), "rank": number, "world_size": size}
        dist.init_process_group(backend, timeout=timeout, device_id=device_id, **where)
    except (dist.DistStoreError, dist.DistNetworkError, TimeoutError) as error:
        what = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"rank {number} of {size} did not meet the others: {what}; "
            "start them together with one MASTER_ADDR and a free MASTER_PORT, or unset WORLD_SIZE to train alone"
        ) from error


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
    return _place()[0] == 0


def world_size() -> int:
    """The number of processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def let_first_rank_speak() -> None:
    """Wait a moment before printing what ends this rank, unless it is its machine's first under torchrun.

    What ends all of them is so printed once, because torchrun ends the others with the first; what ends this one alone
    is printed all the same.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK") != "0":
        time.sleep(_FIRST_RANK_WAIT_S)


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
