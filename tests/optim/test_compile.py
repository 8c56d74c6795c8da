"""`torch.compile` of our steps: one graph, the same numbers, nothing compiled again as training goes on.

Guards against what breaks a graph (a value read on the host) and what compiles anew at every step (a step count or a
learning rate baked into the graph). The backend is "eager", which keeps the graph as dynamo captured it; one slow test
goes all the way to machine code.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim import Optimizer

from largebatch import LAMB, LARS, NNLAMB, Layerwise

# of what torch 2.13 itself imports to compile
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")

MAKERS: dict[str, Callable[..., Optimizer]] = {
    "lamb": LAMB,
    "lamb-decoupled-folded": lambda params, lr: LAMB(
        params, lr, decoupled_weight_decay=True, bias_correction="folded", norm="l1", phi=(0.1, 2.0)
    ),
    "lamb-bfloat16-state": lambda params, lr: LAMB(params, lr, state_dtype=torch.bfloat16),
    "nnlamb": NNLAMB,
    "lars2017": lambda params, lr: LARS(params, lr, form="2017", nesterov=True),
}
every_optimizer = pytest.mark.parametrize("name", list(MAKERS))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def model_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def give_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for x in model.parameters():
        x.grad = torch.randn(x.shape, generator=generator)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def compiled(optimizer: Optimizer, **settings: Any) -> Callable[[], None]:
    return torch.compile(lambda: optimizer.step(), **{"backend": "eager", "fullgraph": True, **settings})


@every_optimizer
def test_a_step_is_one_graph_for_good(name: str) -> None:
    model, twin = model_of(), model_of()
    lr = torch.tensor(0.01)
    optimizer, plain = MAKERS[name](model.parameters(), lr=lr), MAKERS[name](twin.parameters(), lr=0.01)
    step = compiled(optimizer)
    for number in range(3):
        for of, take in ((model, step), (twin, plain.step)):
            give_gradients(of, number)
            take()
        lr.mul_(0.8)
        plain.param_groups[0]["lr"] *= 0.8
        assert graphs() == 1
    # float32(0.01) for the rate, and β^t in float64 as a tensor rather than a number: a few units in the last place.
    for x, y in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    for key, ratio in plain.trust_ratios().items():
        assert float(optimizer.trust_ratios()[key]) == pytest.approx(float(ratio), rel=1e-5)
    assert not torch.equal(next(model.parameters()), next(model_of().parameters()))


@pytest.mark.parametrize("make", [torch.optim.AdamW, LAMB], ids=lambda make: make.__name__)
def test_a_number_for_a_rate_is_compiled_twice_as_by_torch(make: Callable[..., Optimizer]) -> None:
    # Once for the first value, once for all others: what torch's own optimizers do.
    model = model_of()
    optimizer = make(model.parameters(), lr=0.01)
    step = compiled(optimizer, fullgraph=make is not torch.optim.AdamW)  # torch breaks the graph of its own on purpose
    for number in range(3):
        give_gradients(model, number)
        step()
        optimizer.param_groups[0]["lr"] *= 0.9
    assert graphs() == 2


def test_a_bad_gradient_in_a_compiled_step_stops_its_layer() -> None:
    model = model_of()
    optimizer = LAMB(model.parameters(), lr=torch.tensor(0.01))
    step = compiled(optimizer)
    for number, bad in enumerate((None, float("nan"), float("inf"), None)):
        before = [x.detach().clone() for x in model.parameters()]
        give_gradients(model, number)
        if bad is not None:
            model[0].weight.grad[1, 2] = bad
        step()
        moved = [not torch.equal(x, y) for x, y in zip(model.parameters(), before, strict=True)]
        assert moved == [bad is None, True, True, True]
    assert graphs() == 1
    assert all(bool(value.isfinite().all()) for state in optimizer.state.values() for value in state.values())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at the loss
def test_a_whole_training_step_breaks_only_where_torch_does() -> None:
    def trained(wrap: Callable[[Any], Any]) -> list[Tensor]:
        model = model_of()
        optimizer = LAMB(model.parameters(), lr=torch.tensor(0.05))

        def training_step(inputs: Tensor, targets: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = (model(inputs) - targets).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        step = wrap(training_step)
        return [step(torch.randn(8, 4), torch.ones(8, 2)) for _ in range(6)]

    expected = trained(lambda step: step)
    losses = trained(lambda step: torch.compile(step, backend="eager"))
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    zero_grad, backward = sorted(counters["graph_break"], key=lambda reason: "backward" in reason)
    assert "Optimizer.zero_grad" in zero_grad
    assert "backward" in backward


def test_a_scheduler_does_not_compile_the_step_again() -> None:
    # It wraps `optimizer.step`, of ours as of torch's own, in what dynamo does not trace: one break, before our code.
    model = model_of()
    optimizer = LAMB(model.parameters(), lr=torch.tensor(0.01))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    step = compiled(optimizer, fullgraph=False)
    counts = []
    for number in range(3):
        give_gradients(model, number)
        step()
        scheduler.step()
        counts.append(graphs())
    assert counts == [1, 1, 1]
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.01 * 0.8**3)


@pytest.mark.slow  # in seventeen graphs
def test_layerwise_compiles_as_far_as_torch_lets_its_own() -> None:
    model, twin = model_of(), model_of()
    optimizer = Layerwise(torch.optim.AdamW(model.parameters(), lr=0.01))
    plain = Layerwise(torch.optim.AdamW(twin.parameters(), lr=0.01))
    step = compiled(optimizer, fullgraph=False)
    counts = []
    for number in range(3):
        for of, take in ((model, step), (twin, plain.step)):
            give_gradients(of, number)
            take()
        counts.append(graphs())
    assert counts[1] == counts[-1]
    for x, y in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_stochastic_rounding_is_the_same_compiled() -> None:
    model, twin = model_of(), model_of()
    optimizer, plain = (LAMB(of.parameters(), lr=0.01, state_dtype=torch.bfloat16) for of in (model, twin))
    step = compiled(optimizer)
    for of, take in ((model, step), (twin, plain.step)):
        give_gradients(of, 0)
        take()
    for x, y in zip(model.parameters(), twin.parameters(), strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[x][key], plain.state[y][key])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lamb", "lamb-bfloat16-state", "lars2017"])
def test_compiled_to_machine_code(name: str) -> None:
    model, twin = model_of(), model_of()
    optimizer = MAKERS[name](model.parameters(), lr=torch.tensor(0.01))
    plain = MAKERS[name](twin.parameters(), lr=0.01)
    step = compiled(optimizer, backend="inductor")
    for number in range(3):
        for of, take in ((model, step), (twin, plain.step)):
            give_gradients(of, number)
            take()
    assert graphs() == 1
    for x, y in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
