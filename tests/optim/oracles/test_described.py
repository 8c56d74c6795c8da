"""Dialects whose packages need a GPU or are gone, each against a transcription of its description, in NumPy.

The descriptions say of each package what it does in which order: Apex's FusedLAMB and its NVLAMB, DeepSpeed's
FusedLamb, ColossalAI's, cybertronai's, ALBERT's and TensorFlow Addons' LAMB. The state dicts that Apex and torch's
AdamW leave are read into ours, and the run goes on as theirs would have.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from oracle_problem import (
    DIFFERENT,
    LR,
    STEPS,
    Arrays,
    assert_same,
    by_torch,
    difference,
    gradients,
    start,
    values,
    walk,
)

from largebatch import LAMB
from largebatch.optim import convert_state_dict

BETA1, BETA2 = 0.9, 0.999


def clipped(value: float, low: float, high: float) -> float:
    return max(low, min(high, value))


@dataclass
class Described:
    """What packages called LAMB do to one layer: the step's length, and what comes before it."""

    length: Callable[[float, float, float], float]  # of ‖x‖, ‖u‖ and λ: what multiplies the rate
    eps: float
    weight_decay: float
    corrected: str = "moments"  # "moments", "rate", or "nothing"

    def step(self, x: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray, t: int) -> None:
        m[:] = BETA1 * m + (1 - BETA1) * g
        v[:] = BETA2 * v + (1 - BETA2) * g * g
        corrections = (1 - BETA1**t, 1 - BETA2**t)
        first, second = corrections if self.corrected == "moments" else (1.0, 1.0)
        rate = LR * np.sqrt(corrections[1]) / corrections[0] if self.corrected == "rate" else LR
        u = (m / first) / (np.sqrt(v / second) + self.eps) + self.weight_decay * x
        x -= rate * self.length(float(np.linalg.norm(x)), float(np.linalg.norm(u)), self.weight_decay) * u


def if_both(ratio: Callable[[float, float], float]) -> Callable[[float, float, float], float]:
    """The ratio, or 1 where a norm is zero."""
    return lambda x, u, decay: ratio(x, u) if x > 0 and u > 0 else 1.0


def apex_length(x: float, u: float, decay: float) -> float:
    return x / u if decay != 0 and x > 0 and u > 0 else 1.0


plain = if_both(lambda x, u: x / u)
up_to_ten = if_both(lambda x, u: clipped(x, 0, 10) / u)

PACKAGES = {  # as they come
    "apex": Described(apex_length, 1e-6, 0.01),
    "nvlamb": Described(plain, 1e-6, 0.01),
    "tfa": Described(plain, 1e-6, 0.0),
    "albert": Described(plain, 1e-6, 0.01, "nothing"),
    "colossalai": Described(plain, 1e-6, 0.0, "nothing"),
    "cybertronai": Described(up_to_ten, 1e-6, 0.0, "nothing"),
    "torch_optimizer-debias": Described(up_to_ten, 1e-6, 0.0, "rate"),
    "deepspeed": Described(if_both(lambda x, u: clipped(x / u, 0.01, 10)), 1e-8, 0.0, "rate"),
}


def by_description(package: Described) -> Arrays:
    layers = start(np.float64)
    moments = [(np.zeros_like(x), np.zeros_like(x)) for x in layers]
    for step in range(STEPS):
        for x, g, (m, v) in zip(layers, gradients(layers, step), moments, strict=True):
            package.step(x, g, m, v, step + 1)
    return layers


@pytest.mark.parametrize("decay", [{}, {"weight_decay": 0.0}, {"weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("name", PACKAGES)
def test_lamb(name: str, decay: dict[str, float]) -> None:
    settings = {**LAMB.dialect(name), **decay}
    theirs = by_description(replace(PACKAGES[name], **decay))
    assert_same(by_torch(lambda params: LAMB(params, LR, **settings), np.float64), theirs)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("apex", "nvlamb"),
        ("tfa", "albert"),
        ("colossalai", "cybertronai"),
        ("torch_optimizer-debias", "cybertronai"),
        ("deepspeed", "torch_optimizer-debias"),
    ],
)
def test_the_descriptions_tell_the_dialects_apart(name: str, other: str) -> None:
    """The problem has a layer that each pair treats differently: undecayed, above norm ten, or of a ratio above ten."""
    theirs = by_description(replace(PACKAGES[name], weight_decay=0.0))
    settings = {**LAMB.dialect(other), "weight_decay": 0.0}
    assert difference(by_torch(lambda params: LAMB(params, LR, **settings), np.float64), theirs) > DIFFERENT


def as_apex(layers: Arrays, moments: list[tuple[np.ndarray, np.ndarray]], step: int) -> dict:
    """The state dict of Apex's FusedLAMB: the step in the group, none in the state."""
    group = {
        "lr": LR,
        "bias_correction": True,
        "betas": (BETA1, BETA2),
        "eps": 1e-6,
        "weight_decay": 0.1,
        "grad_averaging": True,
        "max_grad_norm": 0.0,
        "step": step,
        "params": list(range(len(layers))),
    }
    state = {i: {"exp_avg": torch.tensor(m), "exp_avg_sq": torch.tensor(v)} for i, (m, v) in enumerate(moments)}
    return {"state": state, "param_groups": [group]}


def renumbered(state_dict: dict) -> dict:
    """Parameters are told apart by numbers, which mean nothing but that."""
    (group,) = state_dict["param_groups"]
    state = {100 - number: state for number, state in state_dict["state"].items()}
    return {"state": state, "param_groups": [{**group, "params": [100 - number for number in group["params"]]}]}


@pytest.mark.parametrize("source", ["apex", "nvlamb"])
def test_a_run_of_apexs_goes_on_as_ours(source: str) -> None:
    layers, package = start(np.float64), replace(PACKAGES[source], weight_decay=0.1)
    moments = [(np.zeros_like(x), np.zeros_like(x)) for x in layers]
    for step in range(STEPS):
        if step == STEPS // 2:
            params = [torch.nn.Parameter(torch.tensor(x)) for x in layers]
            ours = LAMB(params, 3 * LR)
            ours.load_state_dict(convert_state_dict(renumbered(as_apex(layers, moments, step)), source, ours))
        for x, g, (m, v) in zip(layers, gradients(layers, step), moments, strict=True):
            package.step(x, g, m, v, step + 1)
    walk(ours, params, STEPS // 2, STEPS)
    assert_same(values(params), layers)
    assert ours.param_groups[0]["always_adapt"] is (source == "nvlamb")


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_the_moments_of_adam_come_over(kind: type[torch.optim.Optimizer]) -> None:
    """Without the trust ratio, and at the same rate, LAMB's step is AdamW's: so it goes on where AdamW stopped."""
    settings = {"lr": LR, "eps": 1e-6, "weight_decay": 0.0}
    twins = [torch.nn.Parameter(torch.tensor(x)) for x in start(np.float64)]
    adam = kind(twins, **settings)
    walk(adam, twins, 0, STEPS // 2)
    params = [torch.nn.Parameter(x.detach().clone()) for x in twins]
    ours = LAMB([{"params": params, "adapt": False}], **settings)
    fresh = LAMB([{"params": [torch.nn.Parameter(x.detach().clone()) for x in twins], "adapt": False}], **settings)
    ours.load_state_dict(convert_state_dict(adam.state_dict(), "torch", ours))
    walk(adam, twins, STEPS // 2, STEPS)
    walk(ours, params, STEPS // 2, STEPS)
    walk(fresh, fresh.param_groups[0]["params"], STEPS // 2, STEPS)
    assert_same(values(params), values(twins))
    assert difference(values(fresh.param_groups[0]["params"]), values(twins)) > DIFFERENT
    assert ours.param_groups[0]["lr"] == LR


def test_what_cannot_come_over_is_said() -> None:
    layers = start(np.float64)
    moments = [(np.zeros_like(x), np.zeros_like(x)) for x in layers]
    state = as_apex(layers, moments, 3)
    ours = LAMB([torch.nn.Parameter(torch.tensor(x)) for x in layers], LR)
    with pytest.raises(ValueError, match=r"^source='lamb': expected 'apex'"):
        convert_state_dict(state, "lamb", ours)
    with pytest.raises(ValueError, match=r"state_dict=.*: expected groups of timm's, with grad_averaging"):
        convert_state_dict(torch.optim.AdamW(ours.param_groups[0]["params"]).state_dict(), "timm", ours)
    with pytest.raises(ValueError, match=r"^state_dict=\[6\]: expected groups of \[1\]"):
        convert_state_dict(state, "apex", LAMB([torch.nn.Parameter(torch.tensor(layers[0]))], LR))
    for name, value in {"grad_averaging": False, "caution": True, "corrected_weight_decay": True}.items():
        as_it_is = state["param_groups"][0]
        state["param_groups"] = [{**as_it_is, name: value}]
        with pytest.raises(ValueError, match=f"^{name}={value}: expected {not value}"):
            convert_state_dict(state, "apex", ours)
        state["param_groups"] = [as_it_is]
    state["param_groups"][0]["max_grad_norm"] = 1.5
    with pytest.warns(UserWarning, match="max_grad_norm=1.5 is not part of LAMB here"):
        convert_state_dict(state, "apex", ours)
    state["param_groups"][0]["max_grad_norm"] = 0.0
    del state["param_groups"][0]["step"]
    with pytest.raises(ValueError, match=r"^state_dict=\[.*\]: expected a step count in the groups"):
        convert_state_dict(state, "apex", ours)


def test_an_unknown_dialect_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"^dialect='adamw': expected one of paper, paper-v3, albert"):
        LAMB.dialect("adamw")
