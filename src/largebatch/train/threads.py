"""How the command's threads wait for each other, and how many there are.

OpenMP's threads spin at the end of every parallel operation, by default for milliseconds. With free cores that saves
the time of waking them; with other work on the cores the spinning thread keeps from running the one it waits for.
BERT-tiny, two threads, ms a step, on free cores and beside other work: spinning 288 and 886, passive 376 and 537, a
thousand spins 296 and 523 (2-core Zen 4, 2026-11-22). So the command has them spin a thousand times
unless it is told otherwise. OpenMP reads that when it is loaded, before any code of ours runs: hence the restart.
"""

import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

# Says that the environment is to stay as it is: set by the user, and by ourselves before the restart.
KEEP = "LARGEBATCH_KEEP_ENVIRONMENT"
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# torchrun and SLURM start ranks, with one thread each unless told otherwise, and keep an eye on them.
_LAUNCHED = ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "SLURM_PROCID")


def wanted_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what to add to the environment before a restart; nothing if it is to stay as it is.

    It stays under torchrun and SLURM, with one OpenMP thread, where the user has chosen how to wait, and where
    LARGEBATCH_KEEP_ENVIRONMENT is set.
    """
    if any(name in environment for name in (KEEP, *_WAITING, *_LAUNCHED)) or environment.get("OMP_NUM_THREADS") == "1":
        return {}
    return {"GOMP_SPINCOUNT": "1000", "OMP_WAIT_POLICY": "PASSIVE", KEEP: "1"}  # the latter where OpenMP is not GNU's


def restart_to_wait_briefly() -> None:
    """Replace this process by the same command with threads that spin briefly, once, if `wanted_environment` wishes.

    For a process that is the command and nothing else. Its id and its standard streams stay.
    """
    wanted = wanted_environment(os.environ)
    if not wanted or os.name != "posix" or not sys.executable or (os.cpu_count() or 1) < 2:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **wanted})


def fit_threads_to_quota(cgroup: Path = Path("/sys/fs/cgroup")) -> None:
    """Use no more threads than the container's CPU quota pays for; torch counts the cores of the whole machine.

    Threads beyond the quota stop all together for the rest of each period. OMP_NUM_THREADS and fewer threads win.
    """
    cores = quota_cores(cgroup)
    if cores is not None and "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > math.ceil(cores):
        torch.set_num_threads(math.ceil(cores))


def quota_cores(cgroup: Path) -> float | None:
    """Return how many cores' time the control group has, by version 2 or 1 of the kernel's files; None if unlimited."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (cgroup / "cpu" / "cpu.cfs_quota_us").read_text()
            period = (cgroup / "cpu" / "cpu.cfs_period_us").read_text()
        except OSError:
            return None
    try:
        return int(quota) / int(period) if int(quota) > 0 else None
    except (ValueError, ZeroDivisionError):  # "max"
        return None


def describe() -> str:
    """Return the number of threads and how they wait, for the record of a run."""
    chosen = [f"{name}={os.environ[name]}" for name in _WAITING if name in os.environ]
    return ", ".join([f"{torch.get_num_threads()} threads", *(chosen or ["waiting as OpenMP does by default"])])
