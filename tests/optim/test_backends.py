"""Every backend equals the reference, in parameters and in state; and does what only a backend can get wrong.

Guards against flat buffers with one ratio for all, gradients modified in place, temporaries of the size of the model,
and layouts, dtypes and sizes that a fast path forgets.
"""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from optim_cases import BACKENDS, FLOAT32_BACKENDS, OPTIMIZERS, build, give_gradients, largest_difference, layers, run

from largebatch import LAMB
from largebatch.optim import backends, foreach

FAST = [backend for backend in BACKENDS if backend != "reference"]
# Twenty steps of some ten roundings, in units of the dtype's last place.
CLOSE = {torch.float64: 200 * 2**-52, torch.float32: 200 * 2**-23}


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_equals_the_reference(name: str, dtype: torch.dtype, backend: str) -> None:
    params, twins = layers(dtype), layers(dtype)
    fast, slow = build(name, params, backend=backend), build(name, twins, backend="reference")
    run(fast, params, 20)
    run(slow, twins, 20)
    assert largest_difference(params, twins) < CLOSE[dtype]
    assert largest_difference(params, layers(dtype)) > 1e-3, "the steps moved nothing"
    for x, y in zip(params, twins, strict=True):
        assert fast.state[x].keys() == slow.state[y].keys()
        for key, value in fast.state[x].items():
            other = slow.state[y][key]
            assert (value.dtype, value.stride()) == (other.dtype, other.stride())
            assert largest_difference([value], [other]) < CLOSE[dtype] if value.numel() else True
    ratios, expected = fast.trust_ratios(), slow.trust_ratios()
    assert ratios.keys() == expected.keys() == set(range(len(params)))
    for key, ratio in ratios.items():
        assert float(ratio) == pytest.approx(float(expected[key]), rel=CLOSE[dtype])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["lamb", "lamb-decoupled", "nnlamb", "lars", "lars2017-nesterov"])
def test_half_precision_equals_the_reference(name: str, dtype: torch.dtype, backend: str) -> None:
    # Both compute in float32 and round once at the end: a step differs by one unit in the last place, where a value
    # falls on the other side of a rounding boundary. After one step, so that nothing is amplified.
    params, twins = layers(dtype), layers(dtype)
    run(build(name, params, backend=backend), params, 1)
    run(build(name, twins, backend="reference"), twins, 1)
    unit = 2**-8 if dtype is torch.bfloat16 else 2**-11
    for x, y in zip(params, twins, strict=True):
        difference = (x.detach().float() - y.detach().float()).abs()
        assert bool((difference <= 2 * unit * y.detach().float().abs() + 1e-7).all())
        assert int((difference > 0).sum()) <= 0.01 * x.numel() + 1


@pytest.mark.parametrize("bucket", [foreach.CPU_BUCKET, 256], ids=["whole", "tiles"])
def test_states_in_bfloat16_round_as_the_reference_does(bucket: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # To the bit: the noise of an element depends on its layer, its place there, the step and which state it is. And u
    # is of the rounded states, which differ by 2^-9 from the others.
    monkeypatch.setattr(foreach, "CPU_BUCKET", bucket)
    params, twins = layers(torch.float32), layers(torch.float32)
    ours, theirs = (
        build("lamb", xs, backend=backend, state_dtype=torch.bfloat16)
        for xs, backend in ((params, "foreach"), (twins, "reference"))
    )
    run(ours, params, 1)
    run(theirs, twins, 1)
    for x, y in zip(params, twins, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(ours.state[x][key], theirs.state[y][key])
    assert largest_difference(params, twins) < 8 * 2**-23


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_dtypes_in_one_group(backend: str) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32)
    together = [layers(dtype, seed=i)[0] for i, dtype in enumerate(dtypes)]
    alone = copy.deepcopy(together)
    optimizers = [LAMB(together, lr=1e-2, backend=backend), *(LAMB([x], lr=1e-2, backend=backend) for x in alone)]
    for step in range(3):
        give_gradients(together, step)
        for x, twin in zip(together, alone, strict=True):
            twin.grad = x.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for x, twin in zip(together, alone, strict=True):
        assert torch.equal(x, twin)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["lamb", "lars", "lars2017"])
def test_two_skewed_layers_have_two_ratios(name: str, backend: str) -> None:
    # One flat buffer would give both the ratio of the larger one.
    small, large = (torch.full((3,), value, requires_grad=True) for value in (1e-3, 1e3))
    optimizer = build(name, [("small", small), ("large", large)], backend=backend)
    small.grad, large.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    ratios = optimizer.trust_ratios()
    assert float(ratios["large"] / ratios["small"]) > 1e3
    assert float((small.detach() - 1e-3).abs().max()) < 1e-4
    assert float((large.detach() - 1e3).abs().max()) > 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_gradients_are_left_alone(name: str, backend: str) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        params = layers(dtype)
        optimizer = build(name, params, backend=backend)
        give_gradients(params, 0)
        before = [x.grad.clone() for x in params]
        versions = [x.grad._version for x in params]
        optimizer.step()
        assert all(torch.equal(x.grad, g) for x, g in zip(params, before, strict=True))
        assert versions == [x.grad._version for x in params]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_another_layout_or_dtype(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 36, generator=generator).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    x.grad = torch.randn(36, 24, generator=generator).t()
    twin.grad = x.grad.contiguous()
    for one in (x, twin):
        LAMB([one], backend=backend).step()
    assert torch.allclose(x, twin, rtol=1e-6)
    y = torch.ones(300, requires_grad=True)
    y.grad = torch.ones(1).expand(300)
    LAMB([y], lr=0.1, weight_decay=0.0, backend=backend).step()
    assert torch.allclose(y, torch.full((300,), 0.9))


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
def test_a_sparse_gradient_after_dense_ones_is_refused(backend: str) -> None:
    x = torch.ones(4, 3, requires_grad=True)
    optimizer = LAMB([x], backend=backend)
    x.grad = torch.ones(4, 3)
    optimizer.step()
    before = x.detach().clone()
    x.grad = torch.ones(4, 3).to_sparse()
    with pytest.raises(ValueError, match="sparse gradients are not supported: make the embedding dense"):
        optimizer.step()
    assert torch.equal(x, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_without_gradient_stay(backend: str) -> None:
    params = layers()
    give_gradients(params, 0)
    params[0].grad = None
    before = params[0].detach().clone()
    optimizer = LAMB(params, backend=backend)
    optimizer.step()
    assert torch.equal(params[0], before)
    assert 0 not in optimizer.trust_ratios()
    assert 1 in optimizer.trust_ratios()
    assert params[0] not in optimizer.state or not optimizer.state[params[0]]
    for x in params:
        x.grad = None
    optimizer.step()
    assert optimizer.trust_ratios() == {}


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
@pytest.mark.parametrize("name", ["lamb", "nnlamb", "nnlamb-capturable"])
def test_each_layer_counts_the_steps_that_it_took(name: str, backend: str) -> None:
    # Of one group: the second and third come late, the fourth misses one. Each as in an optimizer of its own.
    present = [{0, 1, 2, 3}, {2, 3}, {2, 3}, {0, 2, 3}]
    together, alone = ([torch.linspace(1, 2, 6 + i).requires_grad_() for i in range(4)] for _ in range(2))
    optimizer, *own = (build(name, params, backend=backend) for params in (together, *([y] for y in alone)))
    for step in range(4):
        for params in (together, alone):
            give_gradients(params, step)
        for x, y, its, steps in zip(together, alone, own, present, strict=True):
            if step in steps:
                its.step()
            else:
                x.grad = y.grad = None
        optimizer.step()
    assert largest_difference(together, alone) < CLOSE[torch.float32]
    assert [float(optimizer.state[x]["step"]) for x in together] == [4, 2, 2, 3]


def test_temporaries_are_bounded() -> None:
    # u is never stored: the most that is allocated at once is a few buckets of 256 elements, for 40,000 parameters.
    x = torch.randn(40_000, requires_grad=True)
    x.grad = torch.randn(40_000)
    for name in ("lamb", "nnlamb", "lars", "lars2017"):
        optimizer = build(name, [x], backend="foreach")
        optimizer.step()
        with torch.profiler.profile(profile_memory=True) as profile:
            optimizer.step()
        alive = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                alive += event.nbytes()
                peak = max(peak, alive)
        assert 0 < peak < 40_000


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 3 * 256])
def test_tiles_cover_every_element_once(count: int) -> None:
    x = torch.arange(float(count))
    tiles = [tile for (tile,) in foreach.tiles([x], 256)]
    assert torch.equal(torch.cat(tiles), x)
    assert all(tile.numel() <= 256 for tile in tiles)


def test_tiles_of_more_elements_than_32_bits_count() -> None:
    huge = torch.empty(2**31 + 12_345, 3, device="meta")
    tiles = [tile for tile, _ in foreach.tiles([huge, huge], foreach.BUCKET)]
    assert sum(tile.numel() for tile in tiles) == huge.numel()
    assert tiles[-1].storage_offset() + tiles[-1].numel() == huge.numel()
    assert max(tile.numel() for tile in tiles) == foreach.BUCKET < 2**31


def test_a_bucket_joins_layers_and_stays_within_bounds() -> None:
    params = [torch.randn(size, requires_grad=True) for size in (10, 20, 300, 30)]
    for x in params:
        x.grad = torch.randn_like(x)
    optimizer = LAMB(params, backend="foreach")
    (gathered,) = optimizer._layers_by_device()
    gathered.spread()
    made = list(foreach.buckets(gathered))
    assert [bucket.owners for bucket in made] == [[0, 1], [2], [2, 3]]
    assert [bucket.starts for bucket in made] == [[0, 0], [0], [256, 0]]
    assert all(sum(tile.numel() for tile in bucket.x) <= 256 for bucket in made)


def test_the_choice_of_a_backend() -> None:
    x = [torch.ones(2, requires_grad=True, dtype=torch.float64)]
    assert LAMB(x).backend == "foreach"
    assert LAMB(x, backend="reference").backend == "reference"
    with pytest.raises(ValueError, match="backend='fused': expected one of 'auto', 'reference', 'foreach'"):
        LAMB(x, backend="fused")


def test_a_kernel_that_was_built_is_loaded() -> None:
    # Where it is not, the tests of it are skipped.
    spec = importlib.util.find_spec("largebatch.optim.native")
    if not Path(spec.origin).with_name("kernels.so").exists():
        pytest.skip("the CPU kernel was not compiled when largebatch was installed")
    assert backends.load("native").name == "native"


def test_a_backend_that_is_not_there_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "BACKENDS", ("missing", "reluctant"))
    x = [torch.ones(2, requires_grad=True)]
    with pytest.raises(ValueError, match=r"backend='missing' is not available here: No module named .*missing"):
        LAMB(x, backend="missing")
    monkeypatch.setattr(foreach.Foreach, "refuses", lambda self, rule, params: "needs a GPU")
    monkeypatch.setattr(backends, "load", lambda name: foreach.BACKEND)
    with pytest.raises(ValueError, match="backend='reluctant' cannot serve here: needs a GPU"):
        LAMB(x, backend="reluctant")
