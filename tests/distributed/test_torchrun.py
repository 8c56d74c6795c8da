"""`torchrun -m largebatch train` as users start it: a rank lost in mid-step costs the steps since a checkpoint.

Guards against a job that hangs when a rank is gone, and against a restart from elsewhere, or as another run.
"""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist
from whole_runs import metrics, settings

from largebatch.train.distributed.ranks import _store_of_this_start as store_of_this_start

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def launch(out: Path, chosen: list[str], restarts: int = 1) -> subprocess.Popen:
    """Start a run on two ranks in a session of its own, with its output in files beside it."""
    arguments = [f"--max-restarts={restarts}", "-m", "largebatch", "train", "bert-tiny", "--resume", "--out", str(out)]
    for setting in chosen:
        arguments += ["--set", setting]
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **os.environ}
    with open(out.with_suffix(".out"), "w") as stdout, open(out.with_suffix(".err"), "w") as stderr:
        return subprocess.Popen([*TORCHRUN, *arguments], env=environment, stdout=stdout, stderr=stderr)


def wait_for_step(out: Path, step: int, process: subprocess.Popen, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "metrics.jsonl").exists() and any(line["step"] >= step for line in whole_lines(out)):
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step} within {timeout_s} s: {out.with_suffix('.err').read_text()[-3000:]}")


def whole_lines(out: Path) -> list[dict]:
    try:
        return metrics(out)
    except ValueError:  # a line is being written
        return []


def worker(parent: int, rank: int) -> int:
    """Find the process of a rank below torchrun's."""
    for folder in Path("/proc").iterdir():
        try:
            is_child = f"PPid:\t{parent}\n" in (folder / "status").read_text()
            if is_child and f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
        except OSError:
            continue
    raise AssertionError(f"rank {rank} is not running")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in /proc")
@pytest.mark.timeout(900)  # seconds; on two idle cores some 20, and torchrun's 30 for a rank that heeds no SIGTERM
@pytest.mark.parametrize("what", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "silent"])
def test_a_lost_rank_costs_the_steps_since_the_checkpoint(
    corpus: Path, alone: Path, tmp_path: Path, what: signal.Signals
) -> None:
    """A rank that is killed, or falls silent as on a host that is cut off, which the others wait `timeout_s` for."""
    chosen = settings(corpus, "stages.0.micro_batch_size=8", "stages.1.micro_batch_size=4", "checkpoint_every=10")
    if what is signal.SIGSTOP:
        chosen.append("timeout_s=20")
    out = tmp_path / "disturbed"
    with launch(out, chosen) as process:
        try:
            wait_for_step(out, 13, process, timeout_s=300)
            os.kill(worker(process.pid, rank=1), what)
            assert process.wait(timeout=500) == 0, out.with_suffix(".err").read_text()[-3000:]
        finally:
            process.terminate()
    resumed = [line["step"] for line in metrics(out, "resume")]
    assert resumed in ([10], [20], [30])  # how far it had come by the time of the signal
    losses = [[line["loss"] for line in metrics(run)] for run in (out, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert "step 50/50" in out.with_suffix(".out").read_text()  # the first rank prints, and it alone
    assert out.with_suffix(".out").read_text().count("step 50/50") == 1


@pytest.mark.parametrize(
    ("setting", "expected"), [("optim.lrr=1", "the nearest is optim.lr"), ("optim.lr=1e30", "training diverged")]
)
def test_what_ends_all_ranks_is_printed_once(corpus: Path, tmp_path: Path, setting: str, expected: str) -> None:
    """By the machine's first, before torchrun hears of another that has ended and ends this one."""
    out = tmp_path / "run"
    cut = ["stages.0.micro_batch_size=8", "stages.1.micro_batch_size=4"]
    with launch(out, settings(corpus, *cut, setting), restarts=0) as process:
        assert process.wait(timeout=100) == 1
    said = [line for line in out.with_suffix(".err").read_text().splitlines() if line.startswith("largebatch: ")]
    assert len(said) == 1
    assert expected in said[0]


def test_a_start_is_told_from_the_starts_before_it() -> None:
    """What a process of an earlier start has left in the store, asked or answered, misleads nobody."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    timeout = timedelta(seconds=20)

    def start(delays_s: tuple[float, float, float]) -> list[str]:
        def join(rank: int) -> str:
            time.sleep(delays_s[rank])
            mine = store_of_this_start(rank, 3, timeout)
            if rank == 0:
                mine.set("address", f"of rank 0 at {delays_s}")
            return mine.get("address").decode()

        with ThreadPoolExecutor(3) as pool:
            return list(pool.map(join, range(3)))

    with mock.patch.dict(os.environ, environment):
        for delays_s in ((0.0, 0.0, 0.0), (0.0, 0.3, 0.3), (0.3, 0.0, 0.1)):
            assert start(delays_s) == [f"of rank 0 at {delays_s}"] * 3
        with pytest.raises(TimeoutError, match=r"of 2 ranks \[1\] did not start within 0 s"):
            store_of_this_start(0, 2, timedelta(seconds=0.1))
