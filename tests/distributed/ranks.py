"""Run a function on several gloo ranks that are forked from one process, so that torch is imported once for them all.

Called by the programs beside it, each of which a test starts as a process of its own, with a limit on its time.
"""

import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which the first optimizer imports, in 4 s: once here, and not on every rank
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.fsdp
from torch.utils._python_dispatch import TorchDispatchMode

COLLECTIVE_TIMEOUT_S = 60


class Collectives(TorchDispatchMode):
    """Counts the collectives that are called in its context, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace in ("c10d", "_c10d_functional"):
            self.counts[function._opname] += 1
        return function(*args, **(kwargs or {}))


def on_ranks(num: int, body: Callable[[int], Any], out: Path, timeout_s: float) -> None:
    """Save what ``body(rank)`` returns on each of ``num`` ranks as ``out/<rank>.pt``; exit if one fails or hangs."""
    out.mkdir(parents=True, exist_ok=True)
    processes = {}
    for rank in range(num):
        pid = os.fork()
        if pid == 0:
            _run(rank, num, body, out)
        processes[pid] = rank
    deadline = time.monotonic() + timeout_s
    failed = []
    while processes and not failed and time.monotonic() < deadline:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            rank = processes.pop(pid)
            failed += [rank] if status else []
        else:
            time.sleep(0.02)
    for pid in processes:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    if failed or processes:
        sys.exit(f"{out.name}: rank {failed} failed" if failed else f"{out.name}: not done within {timeout_s} s")


def _run(rank: int, num: int, body: Callable[[int], Any], out: Path) -> None:
    try:
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num), "LOCAL_RANK": str(rank)}
        timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
        dist.init_process_group("gloo", f"file://{out}/store", timeout, world_size=num, rank=rank)
        torch.save(body(rank), out / f"{rank}.pt")
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)
