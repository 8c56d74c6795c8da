"""The C kernel equals the reference, in parameters and in state, whatever the layers look like.

Guards against what compiled code gets wrong: elements past the end, and dtypes and layouts mistaken for others.
"""

import itertools

import pytest
import torch
from optim_cases import OPTIMIZERS, build, largest_difference, layers, run
from torch import Tensor

from largebatch import LAMB
from largebatch.optim.precision import store_weights

native = pytest.importorskip("largebatch.optim.native", exc_type=ImportError)  # a machine without a compiler

# State: twenty steps of some five float32 roundings, each relative to the layer's largest element. The parameters'
# steps add the roundings of a norm, whose 32 lanes of float32 are good to 1e-7. The same bound as for foreach.
CLOSE = 200 * 2**-23
HALVES = [torch.bfloat16, torch.float16]


def twins(name: str, params: list[Tensor], steps: int, **settings: object) -> tuple[list[Tensor], object, object]:
    """Move ``params`` by the native backend and copies by the reference; return the copies and both optimizers."""
    copies = [torch.empty_like(x).copy_(x).requires_grad_() for x in (x.detach() for x in params)]
    ours = build(name, params, backend="native", **settings)
    theirs = build(name, copies, backend="reference", **settings)
    run(ours, params, steps)
    run(theirs, copies, steps)
    return copies, ours, theirs


def states(optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    return [item for state in optimizer.state.values() for item in sorted(state.items())]


# ---- equality with the reference ----


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_equals_the_reference(name: str) -> None:
    params = layers(torch.float32)
    copies, ours, theirs = twins(name, params, 20)
    assert largest_difference(params, copies) < CLOSE
    assert largest_difference(params, layers(torch.float32)) > 1e-3, "the steps moved nothing"
    for (key, value), (other_key, other) in zip(states(ours), states(theirs), strict=True):
        assert (key, value.dtype, value.stride()) == (other_key, other.dtype, other.stride())
        assert largest_difference([value], [other]) < CLOSE if value.numel() else True
        if key.startswith("exp_avg"):  # LAMB's state knows nothing of norms: it is the same arithmetic
            assert torch.equal(value, other)
    ratios, expected = ours.trust_ratios(), theirs.trust_ratios()
    assert ratios.keys() == expected.keys() == set(range(len(params)))
    for key, ratio in ratios.items():
        assert float(ratio) == pytest.approx(float(expected[key]), rel=CLOSE)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_the_two_passes_apart_equal_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on many processes. No u is kept for the second pass, which forms it again, as for layers too large to keep it.
    monkeypatch.setattr(native.Native, "step", lambda self, rule, layers, norm: None)
    params = layers(torch.float32)
    copies, ours, theirs = twins(name, params, 20)
    assert largest_difference(params, copies) < CLOSE
    assert largest_difference(params, layers(torch.float32)) > 1e-3, "the steps moved nothing"
    for key, ratio in ours.trust_ratios().items():
        assert float(ratio) == pytest.approx(float(theirs.trust_ratios()[key]), rel=CLOSE)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_half_precision_equals_the_reference(name: str, dtype: torch.dtype) -> None:
    # After one step, so that nothing is amplified: the results round alike but for values that a last bit of float32
    # puts on the other side of a boundary, and these to the next number, at most so far away.
    params = layers(dtype)
    copies, ours, theirs = twins(name, params, 1)
    unit = torch.finfo(dtype).eps
    for x, y in zip(params, copies, strict=True):
        difference = (x.detach().float() - y.detach().float()).abs()
        assert bool((difference <= unit * y.detach().float().abs() + 2**-24).all())
        assert int((difference > 0).sum()) <= 0.01 * x.numel()
    assert largest_difference(params, layers(dtype)) > 1e-3
    mine, others = ([value for _, value in states(optimizer)] for optimizer in (ours, theirs))
    assert largest_difference(mine, others) < CLOSE


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("name", ["lamb", "nlamb", "nnlamb"])
def test_bfloat16_state_rounds_by_the_same_chance(name: str, dtype: torch.dtype) -> None:
    params = layers(dtype)
    copies, ours, theirs = twins(name, params, 20, state_dtype=torch.bfloat16)
    for (key, value), (_, other) in zip(states(ours), states(theirs), strict=True):
        assert value.dtype is (torch.float32 if key == "step" else torch.bfloat16)
        assert torch.equal(value, other)
    if dtype is torch.float32:
        assert largest_difference(params, copies) < CLOSE
    nearest = build(name, again := layers(dtype), backend="native")
    run(nearest, again, 20)
    assert largest_difference(params, again) > 1e-3, "bfloat16 rounded nothing"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_master_weights(dtype: torch.dtype) -> None:
    params = layers(dtype)
    _, ours, theirs = twins("lamb", params, 20, master_weights=True)
    masters = [[s["master_param"] for s in o.state.values()] for o in (ours, theirs)]
    assert largest_difference(*masters) < CLOSE
    for x, master in zip(params, masters[0], strict=True):
        assert torch.equal(x.detach(), master.to(dtype))
    assert largest_difference(params, layers(dtype)) > 1e-3


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_kind_of_number_rounds_as_torch_rounds(dtype: torch.dtype) -> None:
    # A step of rate 0 rounds the float32 master copy and does nothing else. Some of the values lie on a boundary
    # between two of the dtype, which rounds to even.
    bits = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64).to(torch.int32)
    every_half = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    value = torch.cat([bits.view(torch.float32), every_half, (every_half[1:] + every_half[:-1]) / 2])
    value = value[value.isfinite()]
    x = torch.zeros(len(value), dtype=dtype).requires_grad_()
    x.grad = torch.zeros_like(x)
    optimizer = LAMB([x], lr=0.0, weight_decay=0.0, adapt=False, master_weights=True, backend="native")
    optimizer.step()
    optimizer.state[x]["master_param"].copy_(value)
    optimizer.step()
    expected = torch.zeros_like(x.detach())
    store_weights([expected], [value])
    assert torch.equal(x.detach(), expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_precision_number_is_read_as_torch_reads_it(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.float().abs() < 1e15]  # so that the norm's squares have a sum
    x = torch.zeros(len(every), requires_grad=True)
    x.grad_dtype = dtype
    x.grad = every
    build("lars", [x], lr=1.0, momentum=0.0, weight_decay=0.0, adapt=False, backend="native").step()
    assert torch.equal(-x.detach(), every.float())


# ---- sizes and layouts ----


@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
def test_odd_sizes_and_unaligned_views(norm: str) -> None:
    sizes = [0, 1, 2, 7, 31, 32, 33, 1023, 1024, 1025, 2**15 - 1, 2**15 + 1, 2**16 + 1, 3 * 2**15 + 5]
    room = [torch.randn(size + 3) for size in sizes]
    starts = [1 + i % 2 for i in range(len(sizes))]
    params = [
        part[first : first + size].requires_grad_() for part, first, size in zip(room, starts, sizes, strict=True)
    ]
    before = [part.clone() for part in room]
    copies, _, _ = twins("nnlamb", params, 2, norm=norm)
    assert largest_difference(params, copies) < CLOSE
    for part, old, first, size in zip(room, before, starts, sizes, strict=True):
        assert torch.equal(part[:first], old[:first])
        assert torch.equal(part[first + size :], old[first + size :])


def test_a_bert_embedding_agrees_with_float64_in_every_norm() -> None:
    x = (0.02 * torch.randn(30522, 1024)).requires_grad_()
    x.grad = torch.ones(1).expand(30522, 1024).contiguous()
    for norm, order in (("l2", 2.0), ("l1", 1.0), ("linf", float("inf"))):
        parts = [part.double() for part in x.detach().split(1024)]
        exact = torch.stack([torch.linalg.vector_norm(part, order) for part in parts])
        exact = torch.linalg.vector_norm(exact, order)
        optimizer = LAMB([x], lr=0.0, eps=0.0, weight_decay=0.0, norm=norm, backend="native")
        optimizer.step()
        u_norm = {"l2": x.numel() ** 0.5, "l1": x.numel(), "linf": 1.0}[norm]
        assert float(optimizer.trust_ratios()[0]) == pytest.approx(float(exact) / u_norm, rel=1e-6)


def test_a_layer_beyond_the_parts_of_the_usual_size() -> None:
    # 67M elements, 1.1 GB with gradient and state: from here on the parts of a layer grow. All elements are alike, so
    # that they move as those of a small layer do, whose ratio is the same.
    many, few = ([torch.full((n,), 0.5, requires_grad=True)] for n in ((1 << 26) + 1, 1024))
    for params in (many, few):
        params[0].grad = torch.full_like(params[0], 0.25)
        optimizer = LAMB(params, lr=0.1, backend="native")
        optimizer.step()
        optimizer.step()
    moved, expected = many[0].detach(), few[0].detach()[0]
    assert moved.min() == moved.max()
    assert float(moved[0]) == pytest.approx(float(expected), rel=1e-6)
    assert float(expected) != 0.5


def test_gradients_that_change_their_layout_and_dtype_from_step_to_step() -> None:
    x = torch.randn(24, 36).requires_grad_()
    copy = x.detach().clone().requires_grad_()
    ours, theirs = LAMB([x], backend="native"), LAMB([copy], backend="reference")
    x.grad_dtype = copy.grad_dtype = None
    for step, (transposed, dtype) in enumerate(
        itertools.product([False, True, False], [torch.float32, torch.bfloat16, torch.float64])
    ):
        g = torch.randn(36, 24, generator=torch.Generator().manual_seed(step)).to(dtype).t()
        x.grad = copy.grad = g if transposed else g.contiguous()
        ours.step()
        theirs.step()
        assert largest_difference([x], [copy]) < CLOSE


def test_strides_of_dimensions_of_one_element_mean_nothing() -> None:
    x = torch.randn(8, 6, 1, 1).requires_grad_()
    x.grad = torch.randn(8, 6, 1, 1).to(memory_format=torch.channels_last)
    assert x.grad.stride() != x.stride()
    optimizer = LAMB([x], backend="native")
    (gathered,) = optimizer._layers_by_device()
    table = native.Table(gathered, native.BACKEND.locate)
    assert not table.irregular
    (read,) = table.enter_gradients(gathered)
    assert read is x.grad
