"""Several hosts: network namespaces on this machine, torchrun on each, a link between them that is throttled or cut.

Guards against rendezvous, checkpoints and timeouts that work on one host alone. Needs root and Linux's ip and tc.
"""

import os
import shutil
from pathlib import Path

import pytest
import whole_runs

DEV = Path(__file__).resolve().parents[2] / "dev"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not (DEV / "several_hosts.py").exists() or not shutil.which("tc") or os.geteuid() != 0,
        reason="needs root, ip and tc, and the repository",
    ),
]


@pytest.fixture(name="hosts")
def _hosts(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(DEV))
    import several_hosts

    return several_hosts


@pytest.mark.parametrize("num_hosts", [2, 4])
def test_hosts_train_as_one_process_does(hosts: object, corpus: Path, tmp_path: Path, num_hosts: int) -> None:
    """Over links of 200 Mbit/s; 14 and 1 steps, each some 1e-7 off."""
    chosen = hosts.settings(corpus, num_hosts, 1)
    with hosts.network(num_hosts, 200), hosts.job(num_hosts, tmp_path / "hosts", chosen) as launchers:
        assert [launcher.wait(400) for launcher in launchers] == [0] * num_hosts
    whole_runs.train(tmp_path / "alone", chosen)
    losses = [[line["loss"] for line in whole_runs.metrics(tmp_path / name)] for name in ("hosts", "alone")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] > losses[0][13]


def test_a_host_that_is_cut_off(hosts: object, corpus: Path, tmp_path: Path) -> None:
    """Both ends of the job end by themselves, and the same command goes on from the last checkpoint."""
    result = hosts.cut_off(corpus, tmp_path, tcp_retries=5, timeout_s=15)
    assert result["ended_s"][0] < 15 + 60  # the collective's timeout, and torchrun's own
    assert result["ended_s"][1] < 15 + 120  # six doublings from 0.2 s to 1 s, as the connection goes, and the same
    (resumed,) = result["resumed_from_step"]
    assert resumed % 5 == 0
    assert result["cut_after_step"] - resumed <= 5
    assert result["largest_difference"] < 1e-5
