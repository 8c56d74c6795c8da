"""LAMB and LARS against those of torch_optimizer, which folds the bias correction and clamps ‖x‖ at 10."""

import numpy as np
import pytest
from oracle_problem import DIFFERENT, DTYPES, LR, assert_same, by_torch, difference, peer

from largebatch import LAMB, LARS

Lamb = peer("torch_optimizer.lamb").Lamb
Lars = peer("torch_optimizer.lars").LARS

pytestmark = pytest.mark.filterwarnings("ignore:This overload of:UserWarning")  # its add_(Number, Tensor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", [{}, {"weight_decay": 0.3}], ids=["as it comes", "decaying"])
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("torch_optimizer", {}),
        ("torch_optimizer-debias", {"debias": True}),
        ("cybertronai", {}),
        ("colossalai", {"clamp_value": 1e9}),
    ],
)
def test_lamb(name: str, theirs: dict, decay: dict[str, float], dtype: type) -> None:
    """cybertronai's and ColossalAI's LAMB are the same rule at other settings; neither is on a package index."""
    expected = by_torch(lambda params: Lamb(params, LR, **decay, **theirs), dtype)
    settings = {**LAMB.dialect(name), **decay}
    assert_same(by_torch(lambda params: LAMB(params, LR, **settings), dtype), expected)
    other = LAMB.dialect("paper")
    assert difference(by_torch(lambda params: LAMB(params, LR, **other), dtype), expected) > DIFFERENT


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nesterov", [False, True])
def test_lars(dtype: type, nesterov: bool) -> None:
    """It skips the ratio where nothing decays, so here everything does."""
    shared = {"weight_decay": 0.3, "momentum": 0.9, "nesterov": nesterov}
    theirs = by_torch(lambda params: Lars(params, LR, trust_coefficient=0.5, eps=1e-8, **shared), dtype)
    settings = {"form": "2017", "trust_coefficient": 0.5, "eps": 1e-8, **shared}
    assert_same(by_torch(lambda params: LARS(params, LR, **settings), dtype), theirs)


def test_its_clamp_acts() -> None:
    """The first layer's norm is above 10, so a clamp at 10 shortens its step."""
    clamped = by_torch(lambda params: Lamb(params, LR), np.float64)
    free = by_torch(lambda params: Lamb(params, LR, clamp_value=1e9), np.float64)
    assert difference(clamped[:1], free[:1]) > DIFFERENT
