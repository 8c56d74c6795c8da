"""Buckets of 256 elements in place of 65,536, so that small layers fill several tiles and several share a bucket."""

import pytest

from largebatch.optim import foreach


@pytest.fixture(autouse=True)
def _small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreach, "CPU_BUCKET", 256)
