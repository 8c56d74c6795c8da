"""The optimizer in the backward pass takes the ordinary steps, to the bit, and never holds the full set of gradients.

Guards against a tied weight that moves at its first use, settings and state that the step in the backward pass does not
see (a rate set between steps, a loaded state dict, a cleared state), noise of rounding that depends on who steps, and
against silence where it cannot be right: accumulation, scaled gradients, replicas.
"""

import copy

import pytest
import torch
from deferred_cases import MAKES, Network, assert_same, backward, plain, train, with_a_group_added
from torch import nn
from torch.utils.checkpoint import checkpoint

from largebatch import LAMB, param_groups
from largebatch.optim import CPUOffload, flat_partition, norms, optimizer_in_backward


@pytest.mark.parametrize("name", MAKES)
def test_equals_the_ordinary_step(name: str) -> None:
    expected_model, expected = plain(name)
    model = Network()
    optimizer = MAKES[name](model)
    optimizer_in_backward(optimizer)
    train(model, optimizer)
    assert_same(model, optimizer, expected_model, expected)
    assert not torch.equal(model.first.weight, Network().first.weight)  # the companion: they have moved


def test_one_gradient_at_a_time() -> None:
    """Whenever a gradient is complete no other is there; in the ordinary backward pass they pile up to all eight."""

    def most_gradients(in_backward: bool) -> int:
        model, counts = Network(), []
        optimizer = LAMB(param_groups(model))
        for x in model.parameters():
            x.register_post_accumulate_grad_hook(
                lambda _: counts.append(sum(y.grad is not None for y in model.parameters()))
            )
        if in_backward:
            optimizer_in_backward(optimizer)
        backward(model, 0)
        assert all(x.grad is None for x in model.parameters()) == in_backward
        return max(counts)

    assert most_gradients(in_backward=True) == 1
    assert most_gradients(in_backward=False) == 8


def test_norm_of_the_gradients_that_are_gone() -> None:
    model, reference = Network(), Network()
    handle = optimizer_in_backward(LAMB(param_groups(model)), with_grad_norm=True)
    backward(model, 0)
    backward(reference, 0)
    expected = torch.cat([x.grad.double().flatten() for x in reference.parameters() if x.grad is not None]).norm()
    # One float32 norm for each layer of at most 400 elements, summed in float64.
    torch.testing.assert_close(handle.grad_norm().double(), expected, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="there was no backward pass"):
        handle.grad_norm()
    with pytest.raises(ValueError, match="with_grad_norm=True was not given"):
        optimizer_in_backward(LAMB(Network().parameters())).grad_norm()


@pytest.mark.parametrize("name", ["lamb", "layerwise", "adamw"])
def test_state_dict_is_the_ordinary_one(name: str) -> None:
    """Stopped and resumed from an ordinary optimizer into one in the backward pass, and back again."""
    expected_model, expected = plain(name, steps=6)
    model, optimizer = plain(name, steps=2)
    resumed = copy.deepcopy(model)
    other = MAKES[name](resumed)
    optimizer_in_backward(other)
    other.load_state_dict(optimizer.state_dict())
    train(resumed, other, range(2, 4))
    last = copy.deepcopy(resumed)  # without the hooks
    back = MAKES[name](last)
    back.load_state_dict(other.state_dict())
    train(last, back, range(4, 6))
    assert_same(last, back, expected_model, expected)


def test_state_may_be_cleared_and_groups_added() -> None:
    """As the engine does between stages; parameters that came later move in `step`, and none twice."""

    def in_backward(optimizer: LAMB) -> LAMB:
        optimizer_in_backward(optimizer)
        return optimizer

    assert_same(*with_a_group_added(in_backward), *with_a_group_added(lambda optimizer: optimizer))


def test_removed() -> None:
    expected_model, expected = plain("lamb")
    model = Network()
    optimizer = LAMB(param_groups(model))
    handle = optimizer_in_backward(optimizer)
    train(model, optimizer, range(2))
    handle.remove()
    train(model, optimizer, range(2, 4))
    assert model.first.weight.grad is not None
    train(model, optimizer, range(4, 5))
    assert_same(model, optimizer, expected_model, expected)


def test_a_broken_gradient_holds_its_layer() -> None:
    model = Network()
    optimizer = LAMB(param_groups(model))
    model.middle.bias.register_hook(lambda g: g * float("nan"))
    handle = optimizer_in_backward(optimizer, with_grad_norm=True)
    before = copy.deepcopy(model)
    backward(model, 0)
    optimizer.step()
    assert not handle.grad_norm().isfinite()
    assert torch.equal(model.middle.bias, before.middle.bias)
    assert not torch.equal(model.first.bias, before.first.bias)
    assert optimizer.trust_ratios()["middle.bias"].isnan()
    assert all(x.isfinite().all() for x in model.parameters())


def test_frozen_parameters() -> None:
    """They get no hook, which would fail; thawed they move in the ordinary step."""
    (model, optimizer), (twin, ordinary) = ((m, LAMB(param_groups(m))) for m in (Network(), Network()))
    twin.load_state_dict(model.state_dict())
    model.first.weight.requires_grad_(False)
    twin.first.weight.requires_grad_(False)
    optimizer_in_backward(optimizer)
    train(model, optimizer, range(2))
    train(twin, ordinary, range(2))
    model.first.weight.requires_grad_(True)
    twin.first.weight.requires_grad_(True)
    train(model, optimizer, range(2, 4))
    train(twin, ordinary, range(2, 4))
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), twin.parameters(), strict=True))
    assert optimizer.trust_ratios() == ordinary.trust_ratios()


def test_accumulation_is_refused() -> None:
    model = Network()
    optimizer_in_backward(LAMB(param_groups(model)))
    backward(model, 0)
    with pytest.raises(ValueError, match=r"shape \[12\] came twice in one step.*do not accumulate"):
        backward(model, 1)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_tied_weight_under_checkpointing(use_reentrant: bool) -> None:
    """A reentrant checkpoint sums a tied weight's gradient in parts, which is refused; the other kind does not."""
    layer = nn.Linear(6, 6)
    optimizer_in_backward(LAMB(layer.parameters()))
    h = torch.ones(2, 6, requires_grad=True)
    for _ in range(2):
        h = checkpoint(layer, h, use_reentrant=use_reentrant)
    if use_reentrant:
        with pytest.raises(ValueError, match="use_reentrant=False"):
            h.sum().backward()
    else:
        h.sum().backward()
        assert layer.weight.grad is None


def test_a_gradient_scaler_notices() -> None:
    model = Network()
    optimizer = LAMB(param_groups(model))
    optimizer_in_backward(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.ones(2, 12)).sum()).backward()
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.step(optimizer)


def test_what_cannot_be_right_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Network()
    with pytest.raises(ValueError, match=r"optimizer='LBFGS': expected one that moves each layer by itself"):
        optimizer_in_backward(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(ValueError, match="CPUOffload moves all layers at once"):
        optimizer_in_backward(CPUOffload(LAMB(model.parameters())))
    monkeypatch.setattr(norms, "has_replicas", lambda x: True)  # on real ranks in tests/distributed
    with pytest.raises(ValueError, match="DistributedDataParallel does so after the backward pass"):
        optimizer_in_backward(LAMB(model.parameters()))
    flat = flat_partition(torch.nn.Parameter(torch.ones(4)), {"weight": 4}, start=0)
    with pytest.raises(ValueError, match="flat partition of several processes"):
        optimizer_in_backward(LAMB([flat]))
