"""PyTorch's own conformance, over our optimizers: each is an `OptimizerInfo`, as torch describes its own to its tests.

Guards what users of `torch.optim` rely on without knowing it. The properties are those of torch's test suite
(`TestOptimRenewed`), which is not part of the wheel; the errors are taken from torch's own list. What torch asks of
"foreach" and "fused" is asked of our backends.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, ExponentialLR, LinearLR, PolynomialLR, ReduceLROnPlateau, StepLR

from largebatch import LAMB, LARS, NLAMB, NNLAMB, Layerwise
from largebatch.optim import CPUOffload

pytest.importorskip("expecttest", reason="torch describes its optimizers in a module that needs expecttest")
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
)
from torch.testing._internal.common_utils import TestCase

assert_equal = TestCase().assertEqual  # torch's own: exact for state, dtype and device included

SCHEDULERS = (
    [],
    [lambda opt: StepLR(opt, gamma=0.9, step_size=10)],
    [lambda opt: LinearLR(opt, start_factor=0.4, end_factor=0.8, total_iters=4)],
    [lambda opt: ConstantLR(opt, factor=0.4, total_iters=4), lambda opt: ReduceLROnPlateau(opt)],
    [lambda opt: PolynomialLR(opt, power=0.9, total_iters=40), lambda opt: ExponentialLR(opt, gamma=0.99)],
)


def inputs(*settings: dict[str, Any], **common: Any) -> Callable[..., list[OptimizerInput]]:
    """Return an ``optim_inputs_func``: the settings of every optimizer, and these."""
    shared = ({}, {"lr": 0.01}, {"lr": torch.tensor(0.01)}, {"weight_decay": 0.1}, {"maximize": True})

    def optim_inputs(device: str, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
        every = [{**common, **own} for own in (*shared, *settings)]
        return [OptimizerInput(params=None, kwargs=kwargs, desc=str(kwargs)) for kwargs in every]

    return optim_inputs


def layerwise(base: type[Optimizer]) -> Callable[..., Layerwise]:
    """Return a constructor of `Layerwise` around ``base`` that takes torch's arguments."""

    def construct(params: Any, **settings: Any) -> Layerwise:
        return Layerwise(base(params, **settings))

    construct.__name__ = f"Layerwise{base.__name__}"
    return construct


def offloaded(params: Any, **settings: Any) -> CPUOffload:
    return CPUOffload(LAMB(params, **settings))


ADAM = ({"eps": 1e-3}, {"capturable": True}, {"betas": (0.8, 0.99), "weight_decay": 0.1, "maximize": True})
OURS = [
    OptimizerInfo(cls, optim_inputs_func=inputs(*ADAM, *own), has_capturable_arg=True, **described)
    for cls, own in (
        (LAMB, ({"bias_correction": False}, {"adapt": False}, {"phi": (0.0, 1.0), "norm": "l1"})),
        (NLAMB, ()),
        (NNLAMB, ()),
    )
    for described in ({"supported_impls": (), "not_og_supported_flags": ("maximize",), "supports_complex": False},)
] + [
    OptimizerInfo(cls, optim_inputs_func=of, supported_impls=(), supports_complex=False, not_og_supported_flags=())
    for cls, of in (
        (LARS, inputs({"momentum": 0.5, "nesterov": True}, {"form": "2017"}, lr=0.02)),
        (layerwise(torch.optim.AdamW), inputs({"betas": (0.8, 0.99)})),
        (layerwise(torch.optim.SGD), inputs({"momentum": 0.9, "nesterov": True}, lr=0.02)),
        (offloaded, inputs({"capturable": True})),
    )
]
CASES = [(info, given) for info in OURS for given in info.optim_inputs_func("cpu")]

every_case = pytest.mark.parametrize(
    ("info", "given"), CASES, ids=[f"{info.name}-{number}" for number, (info, _) in enumerate(CASES)]
)
every_optimizer = pytest.mark.parametrize("info", OURS, ids=lambda info: info.name)


def problem(strided: bool = False) -> tuple[Parameter, Parameter, Callable[[Optimizer], Tensor]]:
    """Return a weight, a bias, and the closure of a least-squares loss for an optimizer over them."""
    if strided:
        weight, bias = Parameter(torch.randn(10, 5, 2)[..., 0]), Parameter(torch.randn(10, 2)[..., 0])
        assert not weight.is_contiguous()
    else:
        weight, bias = Parameter(torch.randn(10, 5)), Parameter(torch.randn(10))
    vector = torch.randn(5)

    def closure(optimizer: Optimizer) -> Tensor:
        optimizer.zero_grad()
        loss = (weight.mv(vector) + bias).pow(2).sum()
        loss.backward()
        return loss

    return weight, bias, closure


def started(info: OptimizerInfo, given: OptimizerInput | None = None) -> tuple[Optimizer, Callable[[], Tensor]]:
    """Return an optimizer that has taken two steps, and its closure."""
    weight, bias, closure = problem()
    given = given or info.optim_inputs_func("cpu")[0]
    optimizer = info.optim_cls([weight, bias], **given.kwargs)
    bound = functools.partial(closure, optimizer)
    for _ in range(2):
        optimizer.step(bound)
    return optimizer, bound


def weights(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


# ---- a step ----


@every_case
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_goes_downhill(info: OptimizerInfo, given: OptimizerInput, strided: bool) -> None:
    for makers in SCHEDULERS[:1] if strided else SCHEDULERS:
        weight, bias, closure = problem(strided)
        lr = given.kwargs.get("lr", 1e-3)
        groups = [{"params": [weight]}, {"params": [bias], "lr": lr * 0.5}]
        optimizer = info.optim_cls(groups, **{**given.kwargs, "lr": lr})
        schedulers = [make(optimizer) for make in makers]
        initial = closure(optimizer).item()
        for _ in range(12):
            loss = optimizer.step(functools.partial(closure, optimizer))
            assert isinstance(loss, Tensor)
            for scheduler in schedulers:
                scheduler.step(*([loss.item()] if isinstance(scheduler, ReduceLROnPlateau) else []))
        final = closure(optimizer).item()
        assert final > initial if given.kwargs.get("maximize") else final < initial


@every_optimizer
def test_a_tensor_learning_rate_is_the_number(info: OptimizerInfo) -> None:
    def after(lr: float | Tensor) -> list[Tensor]:
        torch.manual_seed(0)
        weight, bias, closure = problem()
        optimizer = info.optim_cls([weight, bias], lr=lr)
        for _ in range(5):
            optimizer.step(functools.partial(closure, optimizer))
        return [weight, bias]

    expected = after(0.01)
    for lr in (torch.tensor(0.01), torch.tensor([0.01]), torch.tensor(0.01, dtype=torch.float64)):
        # float32(0.01) is off by 2e-8, and five steps of 1% hardly add to the rounding of the weights.
        torch.testing.assert_close(after(lr), expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(after(0.0101), expected, rtol=1e-6, atol=1e-7)


@every_case
def test_a_step_without_gradients_changes_nothing(info: OptimizerInfo, given: OptimizerInput) -> None:
    optimizer, _ = started(info, given)
    optimizer.zero_grad(set_to_none=True)
    before, state = copy.deepcopy(list(weights(optimizer))), copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    assert_equal(list(weights(optimizer)), before)
    assert_equal(optimizer.state_dict(), state)
    untrainable = info.optim_cls([torch.randn(5, 5) for _ in range(2)], **given.kwargs)
    untrainable.step()
    assert not untrainable.state


@every_case
def test_zero_gradients_move_nothing_and_count(info: OptimizerInfo, given: OptimizerInput) -> None:
    weight = Parameter(torch.randn(5, 5))
    optimizer = info.optim_cls([weight], **{**given.kwargs, "weight_decay": 0.0})
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert_equal(weight.detach(), before)
    if "step" in optimizer.state[weight]:
        assert float(optimizer.state[weight]["step"]) == 1


@every_optimizer
def test_the_closure_runs_once_with_gradients_enabled(info: OptimizerInfo) -> None:
    optimizer, closure = started(info)
    seen = []

    def watched() -> Tensor:
        seen.append(torch.is_grad_enabled())
        return closure()

    with torch.no_grad():
        loss = optimizer.step(watched)
    assert seen == [True]
    assert loss.requires_grad
    assert optimizer.step() is None


@every_optimizer
def test_the_default_dtype_changes_nothing(info: OptimizerInfo) -> None:
    def after() -> tuple[list[Tensor], dict[str, Any]]:
        torch.manual_seed(0)
        weight = Parameter(torch.randn(5, 5, dtype=torch.float32))
        optimizer = info.optim_cls([weight], lr=0.01)
        for _ in range(3):
            weight.grad = torch.randn(5, 5, dtype=torch.float32)
            optimizer.step()
        return [weight], optimizer.state_dict()["state"]

    expected = after()
    torch.set_default_dtype(torch.float64)
    try:
        assert_equal(after(), expected, exact_dtype=False)  # torch's own keep their step counts in it
    finally:
        torch.set_default_dtype(torch.float32)


# ---- construction ----


@every_optimizer
def test_refuses_what_torch_refuses(info: OptimizerInfo) -> None:
    common = info.optim_inputs_func("cpu")[0].kwargs
    for error in get_error_inputs_for_all_optims("cpu", torch.float32):
        given = error.optimizer_error_input
        params = [Parameter(torch.ones(1, 1))] if given.params is None else given.params
        expected = error.error_regex
        if given.desc == "Tensor lr must be 1-element":
            expected += "|a tensor of one element"  # in our own words
        assert error.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
        if issubclass(error.error_type, Warning):
            with pytest.warns(error.error_type, match=expected):
                info.optim_cls(params, **{**common, **given.kwargs})
        else:
            with pytest.raises(error.error_type, match=expected):
                info.optim_cls(params, **{**common, **given.kwargs})


@every_optimizer
@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"weight_decay": -0.5}], ids=str)
def test_refuses_settings_out_of_range(info: OptimizerInfo, wrong: dict[str, float]) -> None:
    (name,) = wrong
    given = {**info.optim_inputs_func("cpu")[0].kwargs, **wrong}
    with pytest.raises(ValueError, match=rf"{name}(=| value: | rate: ){wrong[name]}|Invalid learning rate"):
        info.optim_cls([Parameter(torch.ones(1))], **given)


@pytest.mark.parametrize("cls", [LAMB, NLAMB, NNLAMB, LARS])
def test_refuses_complex_parameters_and_sparse_gradients_by_name(cls: type[Optimizer]) -> None:
    with pytest.raises(ValueError, match="complex"):
        cls([Parameter(torch.ones(2, dtype=torch.complex64))], lr=0.1)
    weight = Parameter(torch.ones(2, 2))
    optimizer = cls([weight], lr=0.1)
    weight.grad = torch.ones(2, 2).to_sparse()
    with pytest.raises(ValueError, match="sparse gradients"):
        optimizer.step()
    assert not optimizer.state


@every_case
def test_can_be_printed(info: OptimizerInfo, given: OptimizerInput) -> None:
    optimizer, _ = started(info, given)
    text = str(optimizer)
    assert "Parameter Group 0" in text
    for name in given.kwargs:
        assert name in text or hasattr(optimizer, name)


@every_optimizer
def test_added_groups_take_the_defaults_and_are_checked(info: OptimizerInfo) -> None:
    optimizer, _ = started(info)
    late = Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [late], "lr": 0.5})
    first, second = optimizer.param_groups
    assert second["lr"] == 0.5
    assert {key: second[key] for key in first if key not in ("params", "lr")} == {
        key: first[key] for key in first if key not in ("params", "lr")
    }
    late.grad = torch.ones(3)
    optimizer.step()
    assert not torch.equal(late, torch.ones(3))
    with pytest.raises(ValueError, match="appear in more than one parameter group"):
        optimizer.add_param_group({"params": [late]})
    assert len(optimizer.param_groups) == 2


@every_optimizer
@pytest.mark.parametrize("key", ["lr", "weight_decay"])
def test_a_group_of_its_own_setting_is_an_optimizer_of_its_own(info: OptimizerInfo, key: str) -> None:
    common = {"lr": 0.01, "weight_decay": 0.0}
    together, apart = ([Parameter(torch.arange(1.0, 5.0)) for _ in range(2)] for _ in range(2))
    values = (common[key], 0.3)
    groups = [{"params": [x], key: value} for x, value in zip(together, values, strict=True)]
    optimizers = [info.optim_cls(groups, **common)]
    optimizers += [info.optim_cls([x], **{**common, key: value}) for x, value in zip(apart, values, strict=True)]
    for _ in range(3):
        for x in (*together, *apart):
            x.grad = torch.tensor([1.0, -2.0, 3.0, 0.5])
        for optimizer in optimizers:
            optimizer.step()
    assert_equal(together, apart)
    assert not torch.equal(*together)
