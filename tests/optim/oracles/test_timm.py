"""LAMB and LARS against timm's, in both of its code paths, and its state dict read into ours.

timm imitates Apex and stands for it here, since Apex needs a GPU: its rule is the same, and so is its clipping of the
gradient's global norm to 1 before each step.
"""

import warnings

import numpy as np
import pytest
import torch
from oracle_problem import (
    DIFFERENT,
    DTYPES,
    LR,
    STEPS,
    assert_same,
    by_torch,
    difference,
    peer,
    start,
    values,
    walk,
)

from largebatch import LAMB, LARS
from largebatch.optim import convert_state_dict

Lamb = peer("timm.optim.lamb").Lamb
Lars = peer("timm.optim.lars").Lars

PATHS = pytest.mark.parametrize("foreach", [False, True])


def halves(params: list) -> list[dict]:
    """Two groups, of which the second does not decay: there the dialects part."""
    return [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}]


@PATHS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("paper", {"always_adapt": True}),
        ("timm", {}),
        ("lambc", {"trust_clip": True}),
        ("paper-v3", {"always_adapt": True, "bias_correction": False}),
    ],
)
def test_lamb(name: str, theirs: dict, dtype: type, foreach: bool) -> None:
    expected = by_torch(lambda params: Lamb(halves(params), LR, max_grad_norm=None, foreach=foreach, **theirs), dtype)
    assert_same(by_torch(lambda params: LAMB(halves(params), LR, **LAMB.dialect(name)), dtype), expected)
    other = LAMB.dialect("deepspeed")
    assert difference(by_torch(lambda params: LAMB(halves(params), LR, **other), dtype), expected) > DIFFERENT


@PATHS
@pytest.mark.parametrize(("name", "always_adapt"), [("apex", False), ("nvlamb", True)])
def test_lamb_behind_the_clipping_of_apex(name: str, always_adapt: bool, foreach: bool) -> None:
    """torch's clipping divides by ‖g‖ + 1e-6, timm's by ‖g‖: of gradients this large, 1e-8 of each at most, which
    Adam's direction forgets but for ε."""
    expected = by_torch(lambda params: Lamb(halves(params), LR, always_adapt=always_adapt, foreach=foreach), np.float64)

    def ours(params: list) -> torch.optim.Optimizer:
        return LAMB(halves(params), LR, **LAMB.dialect(name))

    assert difference(by_torch(ours, np.float64, clip=1.0), expected) < 1e-7
    assert difference(by_torch(ours, np.float64), expected) > 1e-6


@PATHS
@pytest.mark.parametrize("dtype", DTYPES)
def test_lamb_with_decoupled_decay(dtype: type, foreach: bool) -> None:
    settings = {"weight_decay": 0.3}
    build = {"decoupled_decay": True, "always_adapt": True, "max_grad_norm": None, "foreach": foreach}
    expected = by_torch(lambda params: Lamb(params, LR, **settings, **build), dtype)
    ours = by_torch(lambda params: LAMB(params, LR, **settings, decoupled_weight_decay=True), dtype)
    assert_same(ours, expected)
    assert difference(by_torch(lambda params: LAMB(params, LR, **settings), dtype), expected) > DIFFERENT


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nesterov", [False, True])
def test_lars(dtype: type, nesterov: bool) -> None:
    shared = {"weight_decay": 0.3, "momentum": 0.9, "nesterov": nesterov}
    expected = by_torch(
        lambda params: Lars(params, LR, dampening=0, trust_coeff=0.5, eps=1e-8, always_adapt=True, **shared), dtype
    )
    settings = {"form": "2017", "trust_coefficient": 0.5, "eps": 1e-8, **shared}
    assert_same(by_torch(lambda params: LARS(params, LR, **settings), dtype), expected)
    other = {**settings, "form": "paper"}
    assert difference(by_torch(lambda params: LARS(params, LR, **other), dtype), expected) > DIFFERENT


@pytest.mark.parametrize("theirs", [{}, {"always_adapt": True}, {"trust_clip": True}, {"decoupled_decay": True}])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_run_of_timms_goes_on_as_ours(theirs: dict, clip: float | None) -> None:
    """With a changed rate, since it is read from the state dict as well."""
    twins = [torch.nn.Parameter(torch.from_numpy(x)) for x in start(np.float64)]
    lamb = Lamb(halves(twins), 3 * LR, weight_decay=0.1, max_grad_norm=clip, **theirs)
    walk(lamb, twins, 0, STEPS // 2)
    params = [torch.nn.Parameter(x.detach().clone()) for x in twins]
    ours = LAMB(halves(params), LR)
    if clip is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            state = convert_state_dict(lamb.state_dict(), "timm", ours)
    else:
        with pytest.warns(UserWarning, match="max_grad_norm=1.0"):
            state = convert_state_dict(lamb.state_dict(), "timm", ours)
    ours.load_state_dict(state)
    walk(lamb, twins, STEPS // 2, STEPS)
    walk(ours, params, STEPS // 2, STEPS, clip)
    assert difference(values(params), values(twins)) < (1e-12 if clip is None else 1e-7)
