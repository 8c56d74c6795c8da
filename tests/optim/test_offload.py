"""An optimizer whose state is on the CPU takes the ordinary steps, to the bit.

On a machine without an accelerator the parameters are on the CPU too, and the copies are tensors of their own, so that
all but the asynchrony of the transfers is tested here (tests marked ``gpu`` have the rest). Guards against copies of
weights, settings or state that have gone stale, and against a state dict that only an offloaded optimizer can read.
"""

import copy
import pickle
from typing import Any

import pytest
import torch
from deferred_cases import MAKES, Network, assert_same, backward, plain, train, with_a_group_added
from torch import nn

from largebatch import LAMB, Layerwise, param_groups
from largebatch.optim import CPUOffload, offload


@pytest.fixture(params=[None, 300], ids=["one chunk", "many chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is not None:
        monkeypatch.setattr(offload, "CHUNK_ELEMENTS", request.param)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("name", MAKES)
def test_equals_the_ordinary_step(name: str) -> None:
    expected_model, expected = plain(name)
    model = Network()
    optimizer = CPUOffload(MAKES[name](model))
    train(model, optimizer)
    assert_same(model, optimizer, expected_model, expected)
    assert not torch.equal(model.first.weight, Network().first.weight)  # the companion: they have moved


def test_the_copies_are_what_moves() -> None:
    """A copy that is tampered with shows in the model, and its memory is none of the model's."""
    model = Network()
    optimizer = CPUOffload(LAMB(param_groups(model), lr=0.0))
    (member, *_) = optimizer._chunks[0].twin.members
    assert member.x is model.first.weight
    assert member.moved.data_ptr() != member.x.data_ptr()
    member.moved.fill_(0.5)
    backward(model, 0)
    optimizer.step()
    assert bool((model.first.weight == 0.5).all())


@pytest.mark.parametrize("name", ["lamb", "lamb, masters", "layerwise", "adamw"])
def test_state_dict_is_the_ordinary_one(name: str) -> None:
    """Stopped and resumed from an ordinary optimizer into an offloaded one, and back again."""
    expected_model, expected = plain(name, steps=6)
    model, optimizer = plain(name, steps=2)
    offloaded = CPUOffload(MAKES[name](model))
    offloaded.load_state_dict(optimizer.state_dict())
    train(model, offloaded, range(2, 4))
    back = MAKES[name](model)
    back.load_state_dict(offloaded.state_dict())
    train(model, back, range(4, 6))
    assert_same(model, back, expected_model, expected)


def test_a_loaded_state_dict_replaces_state_and_settings() -> None:
    model, optimizer = plain("lamb", steps=1)
    fresh = LAMB(param_groups(Network()), lr=0.25, betas=(0.5, 0.75)).state_dict()
    offloaded = CPUOffload(MAKES["lamb"](model))
    assert offloaded.trust_ratios() == {}
    offloaded.load_state_dict(optimizer.state_dict())
    assert offloaded.state
    offloaded.load_state_dict(fresh)
    assert not offloaded.state
    assert [(group["lr"], group["betas"]) for group in offloaded.param_groups] == [(0.25, (0.5, 0.75))] * 2


def test_neighbours_travel_together_as_far_as_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "CHUNK_ELEMENTS", 10)
    params = [torch.zeros(size, requires_grad=True) for size in (4, 6, 1, 9, 1, 30, 2, 3, 6)]
    chunks = CPUOffload(LAMB(params))._chunks
    assert [[member.x.numel() for member in chunk.twin.members] for chunk in chunks] == [
        [4, 6], [1, 9], [1], [30], [2, 3], [6]
    ]  # fmt: skip


@pytest.mark.parametrize("remake", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copied_and_pickled(remake: object) -> None:
    expected_model, expected = plain("lamb")
    model = Network()
    optimizer = CPUOffload(LAMB(param_groups(model)))
    train(model, optimizer, range(2))
    model, optimizer = remake((model, optimizer))
    train(model, optimizer, range(2, 5))
    assert_same(model, optimizer, expected_model, expected)


@pytest.mark.usefixtures("chunks")
def test_weights_loaded_into_the_model_are_taken_over() -> None:
    def trained(offloaded: bool) -> tuple[nn.Module, object]:
        model = Network()
        optimizer = LAMB(param_groups(model))
        optimizer = CPUOffload(optimizer) if offloaded else optimizer
        train(model, optimizer, range(2))
        model.load_state_dict({name: 2 * x for name, x in Network().state_dict().items()})
        train(model, optimizer, range(2, 4))
        return model, optimizer

    assert_same(*trained(True), *trained(False))


@pytest.mark.usefixtures("chunks")
def test_state_may_be_cleared_and_groups_added() -> None:
    assert_same(*with_a_group_added(CPUOffload), *with_a_group_added(lambda optimizer: optimizer))


def test_a_closure_a_scheduler_and_a_frozen_layer() -> None:
    def trained(offloaded: bool) -> tuple[nn.Module, object]:
        model = Network()
        optimizer = LAMB(param_groups(model), lr=0.1)
        optimizer = CPUOffload(optimizer) if offloaded else optimizer
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        for step in range(4):
            model.last.requires_grad_(step != 2)

            def closure(step: int = step) -> float:
                optimizer.zero_grad()
                backward(model, step)
                return float(step)

            assert optimizer.step(closure) == step
            schedule.step()
        return model, optimizer

    assert_same(*trained(True), *trained(False))


def test_what_cannot_be_right_is_refused() -> None:
    model = Network()
    with pytest.raises(ValueError, match=r"base='Network': expected a torch.optim.Optimizer"):
        CPUOffload(model)
    with pytest.raises(ValueError, match=r"optimizer='LBFGS': expected one that moves each layer by itself"):
        CPUOffload(torch.optim.LBFGS(model.parameters()))
    embedding = nn.Embedding(4, 3, sparse=True)
    optimizer = CPUOffload(LAMB(embedding.parameters()))
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse gradients are not supported"):
        optimizer.step()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["lamb", "lamb, masters", "lars", "layerwise"])
def test_from_a_gpu(name: str) -> None:
    """The gradients of the GPU, moved on the CPU: what the CPU makes of the same gradients, to the bit."""
    model, twin = Network().cuda(), Network()
    optimizer, expected = CPUOffload(MAKES[name](model)), MAKES[name](twin)
    for step in range(5):
        optimizer.zero_grad()
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step)).to(model.first.weight)
        model(x).square().mean().backward()
        for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
            ours.grad = None if theirs.grad is None else theirs.grad.cpu()
        optimizer.step()
        expected.step()
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs.cpu())
        assert all(value.device.type == "cpu" for value in optimizer.state[theirs].values())


@pytest.mark.parametrize("wrap", [lambda o: o, CPUOffload], ids=["alone", "offloaded"])
@pytest.mark.parametrize(
    "make", [LAMB, lambda groups: Layerwise(torch.optim.SGD(groups, lr=0.1))], ids=["LAMB", "Layerwise"]
)
def test_layers_of_one_name_each_have_their_ratio(make: Any, wrap: Any) -> None:
    """Two models in one optimizer: a NaN in the first must not hide behind the second's."""
    first, second = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    optimizer = wrap(make(param_groups(first) + param_groups(second)))
    for x in (*first.parameters(), *second.parameters()):
        x.grad = torch.ones_like(x)
    first.weight.grad[0, 0] = float("nan")
    optimizer.step()
    ratios = optimizer.trust_ratios()
    assert list(ratios) == ["weight", "bias", "weight#2", "bias#2"]
    assert ratios["weight"].isnan()
    assert ratios["weight#2"].isfinite()


def test_a_group_added_through_the_wrapped_optimizer_is_moved() -> None:
    first, second = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    base = LAMB([first], lr=0.1)
    optimizer = CPUOffload(base)
    base.add_param_group({"params": [second]})
    first.grad = second.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(first, second)
    assert not torch.equal(second, torch.ones(3))
