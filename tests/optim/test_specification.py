"""The optimizers against an independent float64 specification: parameters and state after 20 steps.

Guards the mathematics itself: every other test compares our code with our code or looks at one property.

Tolerance: one step is some twenty roundings of 1.1e-16 an element, and twenty steps feed on each other, so the two
may part by about 1e-13 relative to the largest element of a tensor; 1e-10 leaves room for another order of summation
in a norm. ``test_the_comparison_can_fail`` swaps one symbol of the specification at a time and expects a
disagreement each time, so the tolerance is not too wide to see one.
"""

import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import specification
import torch
from optim_cases import BACKENDS

import largebatch

STEPS = 20
RTOL = 1e-10
ADAM = {"exp_avg": 0, "exp_avg_sq": 1}

# What each optimizer needs spelled out; the specification has no defaults.
LAMB = {
    "lr": 0.02, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01, "bias_correction": True,
    "phi": None, "norm": "l2", "adapt": True, "maximize": False,
}  # fmt: skip
NADAM = LAMB | {"betas": (0.975, 0.999), "eps": 1e-8}
LARS = {
    "lr": 0.02, "momentum": 0.9, "weight_decay": 0.01, "nesterov": False, "phi": None, "norm": "l2", "adapt": True,
    "maximize": False,
}  # fmt: skip
LARS_2017 = LARS | {"lr": 1.5, "trust_coefficient": 0.02, "eps": 1e-3}


def _sqrt(norms: Any) -> Any:
    """A phi of the user's own, for tensors and for numpy."""
    return norms**0.5


# name -> changes to the settings of the whole optimizer
ADAM_CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no bias correction": {"bias_correction": False},
    "phi cuts above": {"phi": (0.0, 1.0)},
    "phi lifts": {"phi": (5.0, 50.0)},
    "phi of the user": {"phi": _sqrt},
    "l1": {"norm": "l1"},
    "linf": {"norm": "linf"},
    "not adapted": {"adapt": False},
    "not adapted, no decay": {"adapt": False, "weight_decay": 0.0},
    "no decay": {"weight_decay": 0.0},
    "decay of the ImageNet recipe": {"weight_decay": 1.5},
    "maximize": {"maximize": True},
    "maximize, uncorrected, l1, phi": {"maximize": True, "bias_correction": False, "norm": "l1", "phi": (0.5, 3.0)},
    "betas": {"betas": (0.66, 0.9)},
    "signs: both betas 0": {"betas": (0.0, 0.0)},
    "a large eps": {"eps": 0.1},
}
LARS_CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "phi cuts above": {"phi": (0.0, 1.0)},
    "phi lifts": {"phi": (5.0, 50.0)},
    "phi of the user": {"phi": _sqrt},
    "l1": {"norm": "l1"},
    "linf": {"norm": "linf"},
    "not adapted": {"adapt": False, "lr": 0.01},
    "no decay": {"weight_decay": 0.0},
    "maximize": {"maximize": True},
    "nesterov": {"nesterov": True},
    "nesterov, maximize, l1": {"nesterov": True, "maximize": True, "norm": "l1"},
    "no momentum": {"momentum": 0.0},
}
LARS_2017_CASES = LARS_CASES | {
    "no eps": {"eps": 0.0},
    "another coefficient": {"trust_coefficient": 0.1, "lr": 0.3},
}
RULES: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "lamb": (LAMB, ADAM_CASES),
    "nlamb": (NADAM, ADAM_CASES),
    "nnlamb": (NADAM, ADAM_CASES),
    "lars_paper": (LARS, LARS_CASES),
    "lars_2017": (LARS_2017, LARS_2017_CASES),
}
CASES = [(rule, case) for rule, (_, cases) in RULES.items() for case in cases]


def problem() -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """Tensors of different shapes and sizes, and 20 steps of gradients of different scales for each.

    The fourth starts at zero; the fifth has a zero gradient throughout, the sixth on every other step.
    """
    rng = np.random.default_rng(20)
    shapes = [(5, 7), (11,), (3, 2, 4), (6,), (4, 3), (2, 5)]
    x = [rng.normal(scale=10.0 ** rng.uniform(-2, 1), size=shape) for shape in shapes]
    x[3] = np.zeros(shapes[3])
    scales = 10.0 ** rng.uniform(-4, 2, size=len(shapes))
    gradients = []
    for step in range(STEPS):
        g = [scale * (rng.normal(size=shape) + 0.5) for scale, shape in zip(scales, shapes, strict=True)]
        g[4] = np.zeros(shapes[4])
        if step % 2:
            g[5] = np.zeros(shapes[5])
        gradients.append(g)
    return x, gradients


def specified(
    step: Callable[..., Any], settings: list[dict[str, Any]], x: list[np.ndarray], gradients: list[list[np.ndarray]]
) -> tuple[list[np.ndarray], list[Any]]:
    """Run the specification, one tensor after the other; settings are per tensor."""
    moments = "betas" in settings[0]
    finals, states = [], []
    for i, own in enumerate(settings):
        x_i = x[i]
        state = (np.zeros_like(x_i), np.zeros_like(x_i)) if moments else np.zeros_like(x_i)
        for t, g in enumerate(gradients, start=1):
            x_i, state = step(x_i, g[i], state, t, **own) if moments else step(x_i, g[i], state, **own)
        finals.append(x_i)
        states.append(state)
    return finals, states


def build(rule: str, params: Any, backend: str, **settings: Any) -> torch.optim.Optimizer:
    if rule.startswith("lars"):
        return largebatch.LARS(params, form=rule.removeprefix("lars_"), backend=backend, **settings)
    return getattr(largebatch, rule.upper())(params, backend=backend, **settings)


def trained(
    optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], gradients: list[list[np.ndarray]]
) -> None:
    for g in gradients:
        for parameter, g_i in zip(params, g, strict=True):
            parameter.grad = torch.from_numpy(g_i.copy())
        optimizer.step()


def mismatches(
    optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], finals: list[np.ndarray], states: list[Any]
) -> Iterator[str]:
    """Say where the optimizer and the specification part by more than RTOL of the tensor's largest element."""
    for i, parameter in enumerate(params):
        state = optimizer.state[parameter]
        expected = {"x": finals[i]}
        if isinstance(states[i], tuple):
            expected |= {key: states[i][index] for key, index in ADAM.items()}
            assert float(state["step"]) == STEPS
        elif "momentum_buffer" in state:
            expected["momentum_buffer"] = states[i]
        for key, value in expected.items():
            ours = (parameter.detach() if key == "x" else state[key]).numpy()
            assert ours.dtype == np.float64
            error = np.max(np.abs(ours - value)) / (np.max(np.abs(value)) or 1.0)
            if not error <= RTOL:
                yield f"tensor {i}, {key}: relative error {error:.3e}"


def parameters(x: list[np.ndarray]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.from_numpy(x_i.copy())) for x_i in x]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rule", "case"), CASES, ids=lambda value: value)
def test_agrees_with_the_specification(rule: str, case: str, backend: str) -> None:
    base, cases = RULES[rule]
    settings = base | cases[case]
    x, gradients = problem()
    params = parameters(x)
    optimizer = build(rule, params, backend, **settings)
    trained(optimizer, params, gradients)
    finals, states = specified(getattr(specification, rule), [settings] * len(x), x, gradients)
    found = list(mismatches(optimizer, params, finals, states))
    assert found == []


OVERRIDES = {
    "lamb": [{"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-2, "weight_decay": 0.3}, {"adapt": False, "weight_decay": 0.0},
             {"phi": (0.1, 0.7), "bias_correction": False}, {}],
    "lars_paper": [{"lr": 0.1, "weight_decay": 0.3}, {"adapt": False, "weight_decay": 0.0}, {"phi": (0.1, 0.7)}, {}],
    "lars_2017": [{"lr": 1.0, "weight_decay": 0.3}, {"adapt": False, "weight_decay": 0.0}, {"phi": (0.1, 0.7)}, {}],
}  # fmt: skip
OVERRIDES["nlamb"] = OVERRIDES["nnlamb"] = OVERRIDES["lamb"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_a_groups_keys_override_and_reach_no_other_group(rule: str, backend: str) -> None:
    base, overrides = RULES[rule][0], OVERRIDES[rule]
    x, gradients = problem()
    params = parameters(x)
    group_of = [0, 1, 2, 3, 0, 2]
    groups = [
        {"params": [p for p, of in zip(params, group_of, strict=True) if of == index], **changes}
        for index, changes in enumerate(overrides)
    ]
    optimizer = build(rule, groups, backend, **base)
    trained(optimizer, params, gradients)
    finals, states = specified(getattr(specification, rule), [base | overrides[of] for of in group_of], x, gradients)
    found = list(mismatches(optimizer, params, finals, states))
    assert found == []


# One symbol swapped at a time: (rule, what stands in the specification, what is put there).
WRONG = [
    ("lamb", "x - lr", "x + lr"),
    ("lamb", "r + weight_decay", "r - weight_decay"),
    ("lamb", "np.sqrt(v_hat) + eps", "np.sqrt(v_hat + eps)"),
    ("lamb", "(1 - b1) * g", "g"),
    ("lamb", "(1 - b2) * g**2", "(1 - b1) * g**2"),
    ("lamb", "1 - b1**t", "1 - b1 ** (t + 1)"),
    ("lamb", "1 - b2**t", "1 - b2 ** (t - 1) + 1e-3"),
    ("lamb", "trust_ratio(x, u,", "trust_ratio(x, r,"),
    ("lamb", "trust_ratio(x, u,", "trust_ratio(u, x,"),
    ("nlamb", "b1 * m /", "m /"),
    ("nlamb", "(1 - b1) * g / (1 - b1**t)", "(1 - b1) * g / (1 - b1 ** (t + 1))"),
    ("nlamb", "b2 * v /", "v /"),
    ("nnlamb", "b2 * v /", "v /"),
    ("nnlamb", "+ (1 - b2) * g**2 /", "- 0 * g**2 /"),
    ("lars_paper", "(1 - b1) * decayed\n    u", "decayed\n    u"),
    ("lars_paper", "g + weight_decay * x", "g"),
    ("lars_paper", "trust_ratio(x, u,", "trust_ratio(x, g,"),
    ("lars_paper", "x - lr", "x + lr"),
    ("lars_2017", "g_length + weight_decay * x_length", "g_length"),
    ("lars_2017", "and g_length > 0", ""),
    ("lars_2017", "x_length + eps)", "x_length)"),
    ("lars_2017", "ratio * (g + weight_decay * x)", "ratio * g"),
    ("lars_2017", "momentum * m + scaled", "momentum * m + scaled * (1 - momentum)"),
    ("lars_2017", "x - lr * u", "x + lr * u"),
]


@pytest.mark.parametrize(("rule", "right", "wrong"), WRONG, ids=lambda value: value.replace("\n", " "))
def test_the_comparison_can_fail(rule: str, right: str, wrong: str) -> None:
    source = inspect.getsource(getattr(specification, rule))
    assert right in source
    swapped = types.ModuleType("swapped")
    swapped.__dict__.update(vars(specification))
    exec(source.replace(right, wrong, 1), vars(swapped))
    settings = RULES[rule][0]
    x, gradients = problem()
    params = parameters(x)
    optimizer = build(rule, params, "reference", **settings)
    trained(optimizer, params, gradients)
    with np.errstate(all="ignore"):
        finals, states = specified(vars(swapped)[rule], [settings] * len(x), x, gradients)
    found = list(mismatches(optimizer, params, finals, states))
    assert found != []


def test_a_case_that_changes_a_setting_changes_the_result() -> None:
    """No case of the tables is vacuous: each moves the specified parameters by far more than the tolerance."""
    x, gradients = problem()
    for rule, (base, cases) in RULES.items():
        step = getattr(specification, rule)
        plain = np.concatenate([f.ravel() for f in specified(step, [base] * len(x), x, gradients)[0]])
        for case, changes in cases.items():
            if changes:
                finals, _ = specified(step, [base | changes] * len(x), x, gradients)
                moved = np.max(np.abs(np.concatenate([f.ravel() for f in finals]) - plain))
                assert moved > 1e-6, (rule, case)
