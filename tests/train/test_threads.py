"""The command's threads: the environment it restarts with, when it leaves it alone, and containers' CPU quotas."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from largebatch.train import threads

PROGRAM = """
import os, sys
from largebatch.train.threads import restart_to_wait_briefly
print("start", os.environ.get("OMP_WAIT_POLICY"), os.getpid(), sys.argv[1:])
restart_to_wait_briefly()
"""


@pytest.mark.parametrize(
    "environment",
    [
        {threads.KEEP: "1"},
        {"OMP_WAIT_POLICY": "ACTIVE"},
        {"GOMP_SPINCOUNT": "1000"},
        {"KMP_BLOCKTIME": "0"},
        {"OMP_NUM_THREADS": "1"},
        {"WORLD_SIZE": "2", "RANK": "0"},
        {"SLURM_PROCID": "0"},
    ],
)
def test_what_the_user_or_a_launcher_has_chosen_stays(environment: dict[str, str]) -> None:
    assert threads.wanted_environment(environment) == {}


@pytest.mark.parametrize("environment", [{}, {"OMP_NUM_THREADS": "4"}])
def test_otherwise_threads_wait_briefly_and_only_one_restart_follows(environment: dict[str, str]) -> None:
    wanted = threads.wanted_environment(environment)
    assert (wanted["GOMP_SPINCOUNT"], wanted["OMP_WAIT_POLICY"]) == ("1000", "PASSIVE")
    assert threads.wanted_environment({**environment, **wanted}) == {}


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot be replaced there")
def test_the_command_restarts_once_with_its_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the same process prints its start, the second time with the policy and the same arguments."""
    for name in (threads.KEEP, *threads._WAITING, *threads._LAUNCHED, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    script = tmp_path / "program.py"
    script.write_text("import os\nos.cpu_count = lambda: 2\n" + PROGRAM)
    command = [sys.executable, "-u", str(script), "a b", "--set", "x=1"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    first, second = (line.split(maxsplit=3) for line in lines)
    assert (first[1], second[1]) == ("None", "PASSIVE")
    assert first[2:] == second[2:]
    monkeypatch.setenv(threads.KEEP, "1")
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split()[1] for line in lines] == ["None"]


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_a_containers_quota(files: dict[str, str], cores: float | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads.quota_cores(tmp_path) == cores


def test_threads_fit_the_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "cpu.max").write_text("150000 100000")
    threads.fit_threads_to_quota(tmp_path)
    assert asked == [2]
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    threads.fit_threads_to_quota(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    threads.fit_threads_to_quota(tmp_path)
    assert asked == [2]
