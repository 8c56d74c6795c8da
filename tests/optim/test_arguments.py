"""The arguments: what they are if not given, what is refused, and that the refusal says name, value and remedy.

Guards the defaults, which are published figures that a refactoring can change without a formula noticing.
"""

import inspect
import math

import pytest
import torch

from largebatch import LAMB, LARS, NLAMB, NNLAMB, Layerwise

LAMB_DEFAULTS = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-6,
    "weight_decay": 0.01,
    "bias_correction": True,
    "phi": None,
    "norm": "l2",
    "adapt": True,
    "backend": "auto",
    "state_dtype": None,
    "capturable": False,
    "maximize": False,
    "decoupled_weight_decay": False,
    "always_adapt": True,
    "ratio_bounds": None,
    "master_weights": False,
}
LARS_DEFAULTS = {
    "momentum": 0.9,
    "weight_decay": 0.01,
    "form": "paper",
    "trust_coefficient": 1.0,
    "eps": 0.0,
    "nesterov": False,
    "phi": None,
    "norm": "l2",
    "adapt": True,
    "backend": "auto",
    "maximize": False,
}


def weight() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(3, 2))


def defaults(optimizer: type) -> dict:
    parameters = inspect.signature(optimizer).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def test_lambs_defaults_are_the_papers() -> None:
    assert defaults(LAMB) == LAMB_DEFAULTS
    group = LAMB([weight()]).param_groups[0]
    for name in group.keys() & LAMB_DEFAULTS.keys():
        assert group[name] == LAMB_DEFAULTS[name]


@pytest.mark.parametrize("optimizer", [NLAMB, NNLAMB])
def test_the_nesterov_variants_have_nadams(optimizer: type) -> None:
    group = optimizer([weight()]).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-3, (0.975, 0.999), 1e-8, 0.01)


def test_lars_defaults() -> None:
    assert defaults(LARS) == LARS_DEFAULTS
    group = LARS([weight()], lr=0.1).param_groups[0]
    for name in group.keys() & LARS_DEFAULTS.keys():
        assert group[name] == LARS_DEFAULTS[name]


WRONG = [
    ({"lr": -1.0}, r"lr=-1\.0: expected a number >= 0"),
    ({"lr": math.inf}, r"lr=inf: expected a number >= 0"),
    ({"lr": math.nan}, r"lr=nan: expected a number >= 0"),
    ({"lr": torch.ones(2)}, r"lr=tensor.*one element"),
    ({"weight_decay": -0.1}, r"weight_decay=-0\.1: expected a number >= 0"),
    ({"eps": -1e-8}, r"eps=-1e-08: expected a number >= 0"),
    ({"phi": (2.0, 1.0)}, r"phi=\(2\.0, 1\.0\): expected None, a pair \(low, high\), or a callable"),
    ({"phi": (-1.0, 1.0)}, r"phi=\(-1\.0, 1\.0\): expected None"),
    ({"phi": 3}, r"phi=3: expected None"),
    ({"norm": "l3"}, r"norm='l3': expected one of 'l2', 'l1', 'linf'"),
    ({"backend": "cuda"}, r"backend='cuda': expected one of 'auto'"),
]
WRONG_LAMB = [
    ({"betas": (1.0, 0.999)}, r"betas=\(1\.0, 0\.999\): expected two numbers in \[0, 1\)"),
    ({"betas": (0.9, -0.1)}, r"betas=\(0\.9, -0\.1\): expected two numbers in \[0, 1\)"),
    ({"betas": (0.9,)}, r"betas=\(0\.9,\): expected two numbers in \[0, 1\)"),
    ({"ratio_bounds": (1.0, 0.5)}, r"ratio_bounds=\(1\.0, 0\.5\): expected None or a pair \(low, high\)"),
    ({"bias_correction": "fold"}, r"bias_correction='fold': expected True, False or 'folded'"),
    ({"state_dtype": torch.int8}, r"state_dtype=torch\.int8: expected one of None, torch\.float32, torch\.bfloat16"),
]
WRONG_LARS = [
    ({"momentum": 1.0}, r"momentum=1\.0: expected a number in \[0, 1\)"),
    ({"trust_coefficient": 0.0}, r"trust_coefficient=0\.0: expected a number > 0"),
    ({"form": "2018"}, r"form='2018': expected 'paper' or '2017'"),
]
CASES = [(optimizer, *case) for optimizer in (LAMB, NLAMB, NNLAMB) for case in (*WRONG, *WRONG_LAMB)]
CASES += [(LARS, {"lr": 0.1, **settings}, match) for settings, match in (*WRONG, *WRONG_LARS)]


@pytest.mark.parametrize(("optimizer", "settings", "match"), CASES, ids=str)
def test_what_is_out_of_range_is_refused_by_name(optimizer: type, settings: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        optimizer([weight()], **settings)


@pytest.mark.parametrize("settings", [{"betas": (0.0, 0.0)}, {"lr": 0.0}, {"eps": 0.0}, {"ratio_bounds": (0.0, 0.0)}])
def test_the_ends_of_the_ranges_are_taken(settings: dict) -> None:
    LAMB([weight()], **settings)


def test_a_refused_group_is_not_there() -> None:
    optimizer = LAMB([weight()])
    with pytest.raises(ValueError, match="weight_decay"):
        optimizer.add_param_group({"params": [weight()], "weight_decay": -1})
    with pytest.raises(ValueError, match=r"^params=torch\.complex64: expected real parameters"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(("settings", "match"), [({"phi": (2.0, 1.0)}, "phi="), ({"norm": "l3"}, "norm=")])
def test_layerwise_refuses_alike(settings: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Layerwise(torch.optim.SGD([weight()], lr=0.1), **settings)
