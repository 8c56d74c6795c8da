"""Ranks share a global batch and end with the run of one process: one sum of gradients of a global mean."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("rank_program.py")


def train_on(ranks: int, out: Path) -> list[dict]:
    out.mkdir()
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, *launch, str(PROGRAM), str(out)], check=True, timeout=120, env=environment, capture_output=True
    )
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.timeout(240)
def test_two_ranks_train_as_one_process_does(tmp_path: Path):
    """float32 sums in another order: 6 steps with relative error about 1e-7 each; and both ranks agree to the bit."""
    (alone,) = train_on(1, tmp_path / "one")
    first, second = train_on(2, tmp_path / "two")
    assert first["weights"] == second["weights"]
    assert first["losses"] == second["losses"]
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert first["norms"] == pytest.approx(alone["norms"], rel=1e-5)
    assert first["weights"] == pytest.approx(alone["weights"], rel=1e-4, abs=1e-6)
    assert first["samples"] == alone["samples"] == 48
    assert alone["losses"][0] != pytest.approx(alone["losses"][-1], rel=1e-2)  # it did learn something
