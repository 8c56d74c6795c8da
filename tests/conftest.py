"""Fixtures shared by every test: fixed seeds, and the larger real data sets where they are at hand."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of larger real data sets, which lies beside the repository or where LARGEBATCH_DATA says."""
    folder = Path(os.environ.get("LARGEBATCH_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"the larger data sets are not at {folder}; set LARGEBATCH_DATA to run this test")
    return folder
