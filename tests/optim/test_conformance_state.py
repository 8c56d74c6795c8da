"""PyTorch's own conformance, over our optimizers: state dicts, copies and hooks.

Guards exact resumption and what frameworks hang on to: see test_conformance.py, whose optimizers and inputs these are.
"""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from largebatch import LAMB, LARS, Layerwise

pytest.importorskip("expecttest", reason="torch describes its optimizers in a module that needs expecttest")
from test_conformance import (
    OptimizerInfo,
    OptimizerInput,
    assert_equal,
    every_case,
    every_optimizer,
    started,
    weights,
)


def twin_of(optimizer: Optimizer, info: OptimizerInfo, given: OptimizerInput) -> Optimizer:
    """Return a new optimizer of the same settings over copies of the weights."""
    return info.optim_cls([Parameter(x.detach().clone()) for x in weights(optimizer)], **given.kwargs)


def step_alike(*optimizers: Optimizer, steps: int = 3) -> None:
    """Give all optimizers the same gradients, and step them."""
    for step in range(steps):
        for optimizer in optimizers:
            for i, x in enumerate(weights(optimizer)):
                generator = torch.Generator().manual_seed(10 * step + i)
                x.grad = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
            optimizer.step()


# ---- state dicts ----


@every_case
def test_a_loaded_state_dict_continues_bit_for_bit(info: OptimizerInfo, given: OptimizerInput) -> None:
    optimizer, _ = started(info, given)
    state_dict = optimizer.state_dict()
    kept = copy.deepcopy(state_dict)
    twin, fresh = twin_of(optimizer, info, given), twin_of(optimizer, info, given)
    twin.load_state_dict(kept)  # torch's own would share their tensors with a dict that is not a copy
    assert_equal(state_dict, kept)
    step_alike(optimizer, twin, fresh)
    assert all(torch.equal(x, y) for x, y in zip(weights(optimizer), weights(twin), strict=True))
    assert_equal(optimizer.state_dict(), twin.state_dict(), rtol=0, atol=0)
    if any(kept["state"].values()):
        assert not all(torch.equal(x, y) for x, y in zip(weights(optimizer), weights(fresh), strict=True))


@every_case
def test_a_saved_state_dict_loads_with_weights_only(info: OptimizerInfo, given: OptimizerInput) -> None:
    optimizer, _ = started(info, given)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    assert_equal(torch.load(file, weights_only=True), optimizer.state_dict(), rtol=0, atol=0)


@every_optimizer
def test_a_state_dict_is_saved_without_functions(info: OptimizerInfo) -> None:
    """A lambda cannot be pickled; what φ a loaded optimizer has is said where it is made."""

    def made(phi: Any) -> Optimizer:
        torch.manual_seed(0)
        x = Parameter(torch.randn(3, 2))
        groups = [{"params": [x]}, {"params": [Parameter(torch.randn(3))], "phi": (0.5, 2.0)}]
        if "Layerwise" in info.optim_cls.__name__:
            return Layerwise(torch.optim.AdamW(groups, lr=0.1), phi=phi)
        return info.optim_cls(groups, lr=0.1, phi=phi)

    source, twin, other = made(lambda norm: norm / 2), made(lambda norm: norm / 2), made(None)
    step_alike(source)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    for target in (twin, other):
        file.seek(0)
        target.load_state_dict(torch.load(file, weights_only=True))
        with torch.no_grad():
            for x, y in zip(weights(source), weights(target), strict=True):
                y.copy_(x)
    assert callable(source.param_groups[0]["phi"])
    step_alike(source, twin, other)
    same = [[torch.equal(x, y) for x, y in zip(weights(source), weights(each), strict=True)] for each in (twin, other)]
    assert same == [[True, True], [False, True]]


@every_optimizer
def test_an_older_state_dict_takes_the_defaults(info: OptimizerInfo) -> None:
    given = info.optim_inputs_func("cpu")[0]
    optimizer, _ = started(info, given)
    ours = {"phi", "adapt"} if isinstance(optimizer, Layerwise) else optimizer.defaults.keys()
    for key in ours & optimizer.param_groups[0].keys():  # any of which a version to come may have added
        older = copy.deepcopy(optimizer.state_dict())
        del older["param_groups"][0][key]
        twin, plain = twin_of(optimizer, info, given), twin_of(optimizer, info, given)
        plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        twin.load_state_dict(older)
        step_alike(twin, plain)
        assert_equal(list(weights(twin)), list(weights(plain)), rtol=0, atol=0)
        assert_equal(twin.state_dict(), plain.state_dict(), rtol=0, atol=0)


@every_optimizer
def test_settings_that_a_state_dict_lacks_stay_as_they_are_in_each_group(info: OptimizerInfo) -> None:
    given = info.optim_inputs_func("cpu")[0]

    def made(**settings: Any) -> Optimizer:
        torch.manual_seed(0)
        groups = [{"params": [Parameter(torch.randn(3, 2))]}, {"params": [Parameter(torch.randn(3))], **settings}]
        return info.optim_cls(groups, **given.kwargs)

    source, target = made(), made(adapt=False, phi=(0.5, 2.0))
    step_alike(source)
    state_dict = copy.deepcopy(source.state_dict())
    for group in state_dict["param_groups"]:
        del group["adapt"], group["phi"]
    target.load_state_dict(state_dict)
    settings = [(group["adapt"], group["phi"]) for group in target.param_groups]
    assert settings == [(source.param_groups[0]["adapt"], source.param_groups[0]["phi"]), (False, (0.5, 2.0))]


def test_adamws_state_dict_makes_no_decay_decoupled() -> None:
    x, y = Parameter(torch.ones(2, 2)), Parameter(torch.ones(2, 2))
    source = torch.optim.AdamW([x], lr=0.3)
    step_alike(source)
    optimizer = LAMB([y], decoupled_weight_decay=False)
    optimizer.load_state_dict(source.state_dict())
    (group,) = optimizer.param_groups
    assert (group["lr"], group["decoupled_weight_decay"]) == (0.3, False)
    assert torch.equal(optimizer.state[y]["exp_avg"], source.state[x]["exp_avg"])
    group["decoupled_weight_decay"] = True
    other = LAMB([y])
    other.load_state_dict(optimizer.state_dict())  # which still says amsgrad, as torch keeps what it does not know
    assert other.param_groups[0]["decoupled_weight_decay"]


@pytest.mark.parametrize("form", ["paper", "2017"])
def test_the_momentum_of_one_form_of_lars_is_refused_by_the_other(form: str) -> None:
    x, y = Parameter(torch.ones(2, 2)), Parameter(torch.ones(2, 2))
    source = LARS([x], lr=0.1, form=form)
    optimizer = LARS([y], lr=0.1, form={"paper": "2017", "2017": "paper"}[form])
    step_alike(source)
    with pytest.raises(ValueError, match=f"state_dict='{form}': expected momentum of the form"):
        optimizer.load_state_dict(source.state_dict())
    assert not optimizer.state
    with pytest.raises(ValueError, match=f"form='{form}': expected '{optimizer.form}' in all groups"):
        optimizer.add_param_group({"params": [Parameter(torch.ones(1))], "form": form})


def test_sgds_state_dict_without_momentum_is_one_without_state() -> None:
    x, y = Parameter(torch.ones(2, 2)), Parameter(torch.ones(2, 2))
    source, optimizer = torch.optim.SGD([x], lr=0.3), LARS([y], lr=0.1)
    step_alike(source)
    state_dict = source.state_dict()
    state_dict["state"] = {0: {"momentum_buffer": None}}  # as torch wrote it for long
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["lr"] == 0.3
    step_alike(optimizer)
    assert optimizer.state[y]["momentum_buffer"].any()


@pytest.mark.parametrize("kind", [LAMB, LARS])
def test_another_rules_state_is_refused_before_anything_changes(kind: type[Optimizer]) -> None:
    x, y = Parameter(torch.ones(2, 2)), Parameter(torch.ones(2, 2))
    source, optimizer = torch.optim.RMSprop([x]), kind([y], lr=0.1)
    step_alike(source, optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"state_dict=.*'square_avg'.*: expected (exp_avg and|momentum_buffer)"):
        optimizer.load_state_dict(source.state_dict())
    assert_equal(optimizer.state_dict(), before, rtol=0, atol=0)


@every_optimizer
def test_named_and_unnamed_state_dicts_load_into_each_other(info: OptimizerInfo) -> None:
    common = info.optim_inputs_func("cpu")[0].kwargs

    def made(named: bool) -> Optimizer:
        params = [Parameter(torch.ones(2, 2)), Parameter(torch.ones(2))]
        return info.optim_cls(list(zip(("weight", "bias"), params, strict=True)) if named else params, **common)

    for source, target in ((True, False), (False, True), (True, True)):
        first, second = made(source), made(target)
        step_alike(first)
        second.load_state_dict(first.state_dict())
        second_names = second.state_dict()["param_groups"][0].get("param_names")
        assert second_names == ["weight", "bias"]  # torch passes the names on
        assert_equal(first.state_dict()["state"], second.state_dict()["state"])


@every_optimizer
def test_a_state_dict_of_plain_numbers_for_steps_loads(info: OptimizerInfo) -> None:
    given = info.optim_inputs_func("cpu")[0]
    optimizer, _ = started(info, given)
    state_dict = copy.deepcopy(optimizer.state_dict())
    for state in state_dict["state"].values():
        if "step" in state:
            state["step"] = state["step"].item()
    twin = twin_of(optimizer, info, given)
    twin.load_state_dict(state_dict)
    step_alike(optimizer, twin)
    assert_equal(list(weights(optimizer)), list(weights(twin)), rtol=0, atol=0)


@every_optimizer
def test_moments_without_a_step_count_are_refused(info: OptimizerInfo) -> None:
    optimizer, _ = started(info)
    state_dict = copy.deepcopy(optimizer.state_dict())
    if not getattr(optimizer, "counts_steps", False):
        pytest.skip("it counts no steps, or torch does that")
    for state in state_dict["state"].values():
        del state["step"]
    with pytest.raises(ValueError, match=r"state_dict=.*: expected a step count beside every state"):
        twin_of(optimizer, info, info.optim_inputs_func("cpu")[0]).load_state_dict(state_dict)


@every_optimizer
def test_a_step_count_of_another_kind_is_refused(info: OptimizerInfo) -> None:
    optimizer, _ = started(info)
    if not getattr(optimizer, "counts_steps", False):
        pytest.skip("it counts no steps, or torch does that")
    state = next(iter(optimizer.state.values()))
    state["step"] = state["step"].double()  # by hand: loading would make it float32
    with pytest.raises(ValueError, match="expected a float32 tensor on cpu"):
        optimizer.step()


@every_optimizer
def test_loading_leaves_no_hook_behind(info: OptimizerInfo) -> None:
    optimizer, _ = started(info)
    state_dict = optimizer.state_dict()
    optimizer.load_state_dict(state_dict)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({**state_dict, "param_groups": []})
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert not optimizer._optimizer_load_state_dict_post_hooks


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_state_dict_loads_for_parameters_of_another_dtype(info: OptimizerInfo, dtype: torch.dtype) -> None:
    optimizer, _ = started(info)
    given = info.optim_inputs_func("cpu")[0]
    twin = info.optim_cls([Parameter(x.detach().to(dtype)) for x in weights(optimizer)], **given.kwargs)
    twin.load_state_dict(optimizer.state_dict())
    step_alike(optimizer, twin, steps=1)
    # Weights of bfloat16 have 8 bits; the step is a few percent of them at most.
    tolerance = 1e-2 if dtype is torch.bfloat16 else 1e-5
    for x, y in zip(weights(optimizer), weights(twin), strict=True):
        torch.testing.assert_close(x.to(dtype), y, rtol=tolerance, atol=tolerance)
    for state in twin.state.values():
        assert state.get("step", torch.zeros(())).dtype is torch.float32


@every_optimizer
def test_equal_weights_give_an_equal_state_dict(info: OptimizerInfo) -> None:
    optimizer, _ = started(info)
    given = info.optim_inputs_func("cpu")[0]
    first, second = (twin_of(optimizer, info, given) for _ in range(2))
    step_alike(first, second)
    assert_equal(first.state_dict(), second.state_dict(), rtol=0, atol=0)


# ---- copies ----


@every_case
def test_deep_copies_and_pickles_continue_bit_for_bit(info: OptimizerInfo, given: OptimizerInput) -> None:
    optimizer, _ = started(info, given)
    original = copy.deepcopy(optimizer)
    for duplicate in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        public = {name for name in vars(optimizer) if not name.startswith("_")}
        assert {name for name in vars(duplicate) if not name.startswith("_")} == public
        assert_equal(duplicate.state_dict(), original.state_dict(), rtol=0, atol=0)
        reference = copy.deepcopy(original)
        step_alike(duplicate, reference)
        assert_equal(list(weights(duplicate)), list(weights(reference)), rtol=0, atol=0)
        assert_equal(list(weights(optimizer)), list(weights(original)), rtol=0, atol=0)


@every_optimizer
def test_a_deep_copy_has_hooks_of_its_own(info: OptimizerInfo) -> None:
    optimizer, _ = started(info)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("original"))
    duplicate = copy.deepcopy(optimizer)
    duplicate.register_step_post_hook(lambda *_: calls.append("copy"))
    optimizer.step()
    assert calls == ["original"]


# ---- hooks ----


@every_optimizer
def test_hooks_around_a_step_run_in_order(info: OptimizerInfo) -> None:
    optimizer, closure = started(info)
    calls: list[str] = []

    def hook(name: str) -> Any:
        def record(of: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if of is optimizer:  # and not the one that a Layerwise wraps, whose hooks run as well
                calls.append(name)

        return record

    handles = [
        register_optimizer_step_pre_hook(hook("global pre")),
        optimizer.register_step_pre_hook(hook("pre")),
        optimizer.register_step_post_hook(hook("post")),
        register_optimizer_step_post_hook(hook("global post")),
    ]
    try:
        optimizer.step(closure)
    finally:
        for handle in handles:
            handle.remove()
    optimizer.step(closure)
    assert calls == ["global pre", "pre", "post", "global post"]


@every_optimizer
def test_a_pre_hook_can_replace_the_arguments(info: OptimizerInfo) -> None:
    optimizer, closure = started(info)
    optimizer.register_step_pre_hook(lambda of, args, kwargs: ((of, lambda: torch.tensor(42.0)), {}))
    assert optimizer.step(closure) == 42.0


@every_optimizer
def test_hooks_on_state_dicts(info: OptimizerInfo) -> None:
    optimizer, _ = started(info)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda of: calls.append(("saving", of)))
    optimizer.register_state_dict_post_hook(lambda of, state_dict: {**state_dict, "note": 1})
    optimizer.register_load_state_dict_pre_hook(lambda of, loaded: {k: v for k, v in loaded.items() if k != "note"})
    optimizer.register_load_state_dict_post_hook(lambda of: calls.append(("loaded", of)))
    state_dict = optimizer.state_dict()
    assert state_dict["note"] == 1
    optimizer.load_state_dict(state_dict)
    assert [name for name, _ in calls] == ["saving", "loaded"]
    inner = getattr(optimizer, "base", optimizer)
    assert all(of in (optimizer, inner) for _, of in calls)


@every_optimizer
def test_a_load_hook_that_replaces_the_state_decides(info: OptimizerInfo) -> None:
    optimizer, _ = started(info)
    moments = {"exp_avg", "momentum_buffer"} & {key for state in optimizer.state.values() for key in state}

    def zeroed(of: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
        state = {
            number: {key: torch.zeros_like(value) if key in moments else value for key, value in values.items()}
            for number, values in loaded["state"].items()
        }
        return {**loaded, "state": state}

    optimizer.register_load_state_dict_pre_hook(zeroed)
    optimizer.load_state_dict(optimizer.state_dict())
    for state in optimizer.state.values():
        assert all(not value.any() for key, value in state.items() if key in moments)


@every_optimizer
def test_a_step_shows_in_the_profile_under_its_name(info: OptimizerInfo) -> None:
    optimizer, closure = started(info)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step(closure)
        optimizer.zero_grad()
    names = {event.key for event in profile.key_averages()}
    assert f"Optimizer.step#{type(optimizer).__name__}.step" in names
    assert f"Optimizer.zero_grad#{type(optimizer).__name__}.zero_grad" in names


@every_optimizer
def test_zero_grad(info: OptimizerInfo) -> None:
    optimizer, closure = started(info)
    closure()
    grads: list[Tensor] = [x.grad for x in weights(optimizer)]
    optimizer.zero_grad(set_to_none=False)
    assert all(x.grad is g and not g.any() for x, g in zip(weights(optimizer), grads, strict=True))
    optimizer.zero_grad()
    assert all(x.grad is None for x in weights(optimizer))


@every_optimizer
def test_state_of_another_shape_is_refused_before_anything_changes(info: OptimizerInfo) -> None:
    """A head of more classes, a matrix the other way round: read as they lie, they would be other numbers, or none."""
    made = Layerwise if "Layerwise" in info.optim_cls.__name__ else None

    def build(*shape: int) -> Optimizer:
        params = [Parameter(torch.ones(2)), Parameter(torch.ones(*shape))]
        return Layerwise(torch.optim.AdamW(params)) if made else info.optim_cls(params, lr=0.1)

    source = build(3, 2)
    step_alike(source)
    if made:
        return  # what its base does
    for shape in ((4, 2), (2, 3), (3,)):
        optimizer = build(*shape)
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(ValueError, match=r"of parameter 1 has the shape \[3, 2\], and the parameter \["):
            optimizer.load_state_dict(source.state_dict())
        assert_equal(optimizer.state_dict(), before, rtol=0, atol=0)


def test_a_hook_after_loading_has_the_last_word() -> None:
    x, y = Parameter(torch.ones(2, 2)), Parameter(torch.ones(2, 2))
    source, optimizer = LAMB([x], lr=0.1), LAMB([y], lr=0.1, state_dtype=torch.bfloat16)
    step_alike(source)
    seen = []

    def start_again(loaded: Optimizer) -> None:
        seen.append(loaded.state[y]["exp_avg"].dtype)
        loaded.state[y]["exp_avg"] = torch.zeros(2, 2, dtype=torch.bfloat16)

    optimizer.register_load_state_dict_post_hook(start_again)
    optimizer.load_state_dict(source.state_dict())
    assert seen == [torch.bfloat16]
    assert not optimizer.state[y]["exp_avg"].any()
    optimizer.register_load_state_dict_post_hook(lambda loaded: loaded.state.clear())
    optimizer.load_state_dict(source.state_dict())
    assert not optimizer.state


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.RAdam, torch.optim.NAdam])
@pytest.mark.parametrize("decoupled", [True, False])
def test_where_the_decay_of_torchs_optimizers_goes_is_not_taken_over(kind: Any, decoupled: bool) -> None:
    """They mean by it whether the gradient holds the decay, and LAMB whether the trust ratio does."""
    x, y = Parameter(torch.ones(2, 2)), Parameter(torch.ones(2, 2))
    settings = {} if kind is torch.optim.AdamW else {"decoupled_weight_decay": decoupled}
    source, optimizer = kind([x], lr=0.1, **settings), LAMB([y], lr=0.1, decoupled_weight_decay=not decoupled)
    step_alike(source)
    optimizer.load_state_dict(source.state_dict())
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is not decoupled


@pytest.mark.parametrize("form", ["paper", "2017"])
def test_sgds_momentum_is_refused(form: str) -> None:
    """It is a sum of gradients: neither an average, nor scaled by the trust ratio."""
    x, y = Parameter(torch.ones(2, 2)), Parameter(torch.ones(2, 2))
    source, optimizer = torch.optim.SGD([x], lr=0.3, momentum=0.9), LARS([y], lr=0.1, form=form)
    step_alike(source)
    with pytest.raises(ValueError, match=f"state_dict=\"SGD's momentum\": expected momentum of the form '{form}'"):
        optimizer.load_state_dict(source.state_dict())


def test_a_phi_that_came_past_the_loader_is_the_optimizers_own() -> None:
    """As ZeRO hands groups to the optimizer within it."""
    x = Parameter(torch.ones(2, 2))
    source, optimizer, other = (LAMB([x], lr=0.1, phi=phi) for phi in (torch.sqrt, torch.sqrt, None))
    saved = source.state_dict()["param_groups"][0]["phi"]
    for each in (optimizer, other):
        each.param_groups[0]["phi"] = saved
    step_alike(optimizer)
    assert float(optimizer.trust_ratios()[0]) != 1
    with pytest.raises(ValueError, match="phi='a function': expected the φ itself"):
        step_alike(other)
    base = torch.optim.AdamW([x])
    base.load_state_dict(Layerwise(torch.optim.AdamW([x]), phi=torch.sqrt).state_dict())
    assert Layerwise(base, phi=torch.abs).param_groups[0]["phi"] is torch.abs


def test_of_groups_that_do_not_match_torch_says_so() -> None:
    params = [Parameter(torch.ones(2, 2)), Parameter(torch.ones(2))]
    source = LAMB([{"params": params[1:]}, {"params": params[:1]}], lr=0.1)
    step_alike(source)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        LAMB(params, lr=0.1).load_state_dict(source.state_dict())
