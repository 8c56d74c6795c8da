"""Compiled element-wise work: the same numbers, one graph without a break, and nothing compiled anew as lengths change.
Attention with dropout by keys within what a user compiles.

Through dynamo, with backends that run on any machine: "eager" calls the captured graph's operations one by one,
"aot_eager" those of the captured backward pass too.
"""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import prune

from largebatch.models import BertConfig, BertForPreTraining, compile_elementwise, pretraining_loss
from largebatch.models.keyed_attention import keyed_attention

# Of dynamo's own doing: it looks at the gradient of what is no leaf, and makes an instance of an autograd function.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
]

TOTALS = {"masked": torch.tensor(10), "sequences": torch.tensor(5)}
MIXES = [[7, 3, 7, 50, 3, 7], [12, 11], [64], [2, 2, 2, 40], [33, 9, 5]]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_same_numbers_and_two_graphs_for_all_lengths(
    backend: str,
    keyed: bool,
    autocast: bool,
    small_config: BertConfig,
    make_batch: Callable,
    assert_same_gradients: Callable,
) -> None:
    """fp32: the order of two additions. bf16: LayerNorm's statistics see rows that were rounded elsewhere, by 2^-8."""
    tolerance = 3e-2 if autocast else 1e-5
    config = dataclasses.replace(small_config, hidden_dropout_prob=0.1)
    torch.manual_seed(1)
    model, twin = BertForPreTraining(config).train(), BertForPreTraining(config).train()
    twin.load_state_dict(model.state_dict())
    counter = CompileCounterWithBackend(backend)
    compile_elementwise(model, backend=counter)
    seen = []
    for lengths in MIXES:
        batch = make_batch(lengths, 64)
        if keyed:
            batch["dropout_keys"] = torch.arange(len(lengths)) * 12345
        for one in (model, twin):
            one.zero_grad()
            torch.manual_seed(3)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss, _ = pretraining_loss(one, batch, TOTALS)
            loss.backward()
        assert_same_gradients(model, twin, tolerance)
        seen.append(counter.frame_count)
    # One for each of the two functions, in 3 layers and 5 mixes of lengths; "aot_eager" counts a part of its own.
    assert seen == [2 if backend == "eager" else seen[0]] * len(MIXES)
    assert seen[0] <= 3


def test_evaluation_and_checkpointed_layers(small_config: BertConfig, make_batch: Callable) -> None:
    config = dataclasses.replace(small_config, hidden_dropout_prob=0.1)
    batch = make_batch([7, 30, 7], 64)
    model = BertForPreTraining(config, checkpoint_layers=True)
    twin = BertForPreTraining(config)
    twin.load_state_dict(model.state_dict())
    compile_elementwise(model, backend="eager")
    pretraining_loss(model.train(), batch, TOTALS)[0].backward()
    with torch.no_grad():
        losses = [pretraining_loss(one.eval(), batch, TOTALS)[0] for one in (model, twin)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


def test_the_weights_keep_their_names(small_config: BertConfig) -> None:
    model = BertForPreTraining(small_config)
    names = list(model.state_dict())
    compile_elementwise(model, backend="eager")
    assert list(model.state_dict()) == names


def test_a_layer_that_does_more_is_called(
    small_config: BertConfig, make_batch: Callable, assert_same_gradients: Callable
) -> None:
    """In two steps, as the weight of a pruned layer is made anew in each. 1e-5: the order of two additions."""
    torch.manual_seed(1)
    model, twin = BertForPreTraining(small_config), BertForPreTraining(small_config)
    twin.load_state_dict(model.state_dict())
    compile_elementwise(model, backend="eager")
    batch, seen = make_batch([7, 30, 7], 64), []
    for one in (model, twin):
        layer = one.bert.encoder.layer[1]
        layer.output.LayerNorm.register_forward_hook(lambda _, __, normed: seen.append(normed) or 2 * normed)
        prune.l1_unstructured(layer.intermediate.dense, "weight", 0.5)
        for _ in range(2):
            one.zero_grad()
            pretraining_loss(one, batch, TOTALS)[0].backward()
            torch.optim.SGD(one.parameters(), 0.1).step()
    assert len(seen) == 4
    assert_same_gradients(model, twin, 1e-5)


@pytest.mark.filterwarnings("ignore:Dynamo:UserWarning")  # it looks at the kernel's cache, which is not asked then
def test_attention_by_keys_within_a_compiled_model() -> None:
    """Without a tensor to write to that lies apart, which the compiler refuses. 1e-5: the scores' product is tiled."""
    products, bias, keys = torch.randn(29, 48), torch.randn(48), torch.arange(29, dtype=torch.int32)
    seen = []
    for function in (keyed_attention, torch.compile(keyed_attention, backend="aot_eager")):
        leaves = [each.clone().requires_grad_() for each in (products, bias)]
        context = function(*leaves, 2, [(1, 4), (1, 25)], keys, 3, 0.3)
        seen.append([context.detach(), *torch.autograd.grad(context.square().sum(), leaves)])
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
