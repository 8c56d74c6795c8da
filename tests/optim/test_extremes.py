"""The ends of the range: zeros, inf and NaN, float16's and float32's largest and smallest numbers.

Guards one promise: no step makes a weight or a state that is not finite, whatever the gradient, and a layer that could
not move says so. What each case does is the table in docs/mathematics.md. `test_torch_would_be_poisoned` shows that the
inputs are bad enough for the promise to mean something.
"""

import copy

import pytest
import torch
from optim_cases import FLOAT32_BACKENDS, OPTIMIZERS, build, give_gradients, largest_difference, layers, run

from largebatch import LAMB, NLAMB, NNLAMB, Layerwise
from largebatch.optim import foreach

# The interpreter of Triton's kernels computes by NumPy, which tells of inf and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INF, NAN = float("inf"), float("nan")
RULES = ["lamb", "lamb-decoupled", "nnlamb", "lars", "lars-nesterov", "lars2017-nesterov", "lamb-unadapted"]
BAD = {"-inf": -INF, "nan": NAN, "1e30": 1e30}

every_rule = pytest.mark.parametrize("name", RULES)


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a backend; "foreach-on-device" takes the path of an accelerator, which may not read a value."""
    if request.param == "foreach-on-device":
        monkeypatch.setattr(foreach, "on_host", lambda a: False)
        return "foreach"
    if request.param == "triton" and not pytest.importorskip("largebatch.optim.triton").interpreted():
        pytest.skip("Triton compiles here; set TRITON_INTERPRET=1 to interpret")
    return request.param


every_backend = pytest.mark.parametrize("backend", [*FLOAT32_BACKENDS, "foreach-on-device", "triton"], indirect=True)


def all_finite(optimizer: torch.optim.Optimizer, params: list[torch.Tensor]) -> bool:
    states = [value for state in optimizer.state.values() for value in state.values()]
    return all(bool(a.isfinite().all()) for a in (*params, *states))


# ---- inf and NaN ----


@every_backend
@every_rule
@pytest.mark.parametrize("bad", list(BAD))
def test_a_bad_gradient_stops_its_layer_for_one_step(name: str, backend: str, bad: str) -> None:
    params, twins = layers(torch.float32)[:3], layers(torch.float32)[:3]
    optimizer, twin = build(name, params, backend=backend), build(name, twins, backend=backend)
    run(optimizer, params, 2)
    run(twin, twins, 2)
    before = params[0].detach().clone()
    for of in (params, twins):
        give_gradients(of, 2)
    params[0].grad[3, 5] = BAD[bad]
    twins[0].grad[3, 5] = 0.0
    optimizer.step()
    twin.step()
    ratios = optimizer.trust_ratios()
    assert torch.equal(params[0], before)
    assert ratios[0].isnan()
    assert not torch.equal(twins[0], before)
    # Elsewhere nothing is different: not in the averages, where the element counts as 0, nor in any other layer. Only
    # the momentum of 2017, which takes the ratio in, stays as it is.
    for i, (x, y) in enumerate(zip(params, twins, strict=True)):
        assert i == 0 or torch.equal(x, y)
        if i or "lars2017" not in name:
            for key, value in optimizer.state[x].items():
                assert torch.equal(value, twin.state[y][key]), (i, key)
    assert all_finite(optimizer, params)
    run(optimizer, params, 1, first=3)
    assert not torch.equal(params[0], before)
    assert optimizer.trust_ratios()[0].isfinite()
    assert all_finite(optimizer, params)


@every_backend
@every_rule
def test_nothing_but_nan_for_many_steps_moves_nothing(name: str, backend: str) -> None:
    params = layers(torch.float32)
    optimizer = build(name, params, backend=backend)
    run(optimizer, params, 1)
    before = copy.deepcopy(params)
    for _ in range(3):
        for x in params:
            x.grad = torch.full_like(x, NAN)
        optimizer.step()
    filled = [i for i, x in enumerate(params) if x.numel()]
    assert all(torch.equal(x, y) for x, y in zip(params, before, strict=True))
    assert all(optimizer.trust_ratios()[i].isnan() for i in filled)
    assert all_finite(optimizer, params)
    run(optimizer, params, 1, first=1)
    assert not any(torch.equal(params[i], before[i]) for i in filled)
    assert all_finite(optimizer, params)


def test_torch_would_be_poisoned() -> None:
    x = torch.ones(4, requires_grad=True)
    optimizer = torch.optim.AdamW([x])
    for gradient in (torch.tensor([NAN, 1.0, 1.0, 1.0]), torch.ones(4)):
        x.grad = gradient
        optimizer.step()
    assert x[0].isnan()


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_bad_gradients_of_every_dtype(dtype: torch.dtype, backend: str) -> None:
    if backend == "native" and dtype is torch.float64:
        pytest.skip("not a dtype that it moves")
    for bad in (INF, NAN):
        params = layers(dtype)
        optimizer = LAMB(params, backend=backend)
        give_gradients(params, 0)
        params[0].grad[0, 0] = bad
        before = params[0].detach().clone()
        optimizer.step()
        assert torch.equal(params[0], before)
        assert all_finite(optimizer, params)


@every_backend
def test_bad_gradients_with_low_precision_state_and_master_weights(backend: str) -> None:
    for settings in ({"state_dtype": torch.bfloat16}, {"master_weights": True}):
        params = layers(torch.bfloat16)
        optimizer = LAMB(params, backend=backend, **settings)
        run(optimizer, params, 1)
        before = params[0].detach().clone()
        give_gradients(params, 1)
        params[0].grad[0, 0] = INF
        optimizer.step()
        assert torch.equal(params[0], before)
        assert all_finite(optimizer, params)


@every_backend
def test_a_phi_that_fails_stops_its_group(backend: str) -> None:
    for result in (INF, NAN):
        params = layers(torch.float32)[:2]
        before = copy.deepcopy(params)
        broken = {"params": params[:1], "phi": lambda norms, result=result: norms * result}
        optimizer = LAMB([broken, {"params": params[1:]}], backend=backend)
        run(optimizer, params, 1)
        assert torch.equal(params[0], before[0])
        assert not torch.equal(params[1], before[1])
        assert optimizer.trust_ratios()[0].isnan()


@every_backend
def test_weights_that_are_not_finite_are_left_as_they_are(backend: str) -> None:
    x = torch.tensor([INF, 1.0, 2.0], requires_grad=True)
    optimizer = LAMB([x], backend=backend)
    run(optimizer, [x], 2)
    assert x.tolist() == [INF, 1.0, 2.0]
    assert optimizer.trust_ratios()[0].isnan()


@pytest.mark.parametrize("bad", list(BAD))
def test_layerwise_leaves_the_layer_and_the_state_is_the_base_optimizers(bad: str) -> None:
    params = layers(torch.float32)[:2]
    before = copy.deepcopy(params)
    optimizer = Layerwise(torch.optim.SGD(params, lr=0.1, momentum=0.9))
    give_gradients(params, 0)
    params[0].grad[3, 5] = BAD[bad]
    optimizer.step()
    assert torch.equal(params[0], before[0])
    assert not torch.equal(params[1], before[1])
    assert optimizer.trust_ratios()[0].isnan()
    assert optimizer.state[params[0]]["momentum_buffer"][3, 5].tolist() == pytest.approx(BAD[bad], nan_ok=True)


# ---- zeros ----


@every_backend
@every_rule
def test_zero_weights_take_the_plain_step(name: str, backend: str) -> None:
    x, y = torch.zeros(6, requires_grad=True), torch.zeros(6, requires_grad=True)
    adapted, plain = build(name, [x], backend=backend), build(name, [y], backend=backend, adapt=False)
    for one, optimizer in ((x, adapted), (y, plain)):
        one.grad = torch.arange(6.0)
        optimizer.step()
    assert torch.equal(x, y)
    assert x[1] != 0
    assert x[0] == 0


@every_backend
@every_rule
@pytest.mark.parametrize("eps", [None, 0.0])
def test_zero_gradients_leave_decay_alone(name: str, backend: str, eps: float | None) -> None:
    settings = {} if eps is None else {"eps": eps}
    x = torch.tensor([1.0, -2.0, 0.0], requires_grad=True)
    before = x.detach().clone()
    optimizer = build(name, [x], backend=backend, weight_decay=0.0, **settings)
    x.grad = torch.zeros(3)
    for _ in range(3):
        optimizer.step()
    assert torch.equal(x, before)
    assert all_finite(optimizer, [x])
    decaying = build(name, [x], backend=backend, **settings)
    decaying.step()
    assert bool((x[:2].abs() < before[:2].abs()).all())
    assert x[2] == 0


@every_backend
@pytest.mark.parametrize("cls", [LAMB, NLAMB, NNLAMB])
def test_without_eps_elements_that_never_had_a_gradient_stay(cls: type[LAMB], backend: str) -> None:
    # Rows of an embedding that no batch has named yet: 0/0, which is NaN in torch's AdamW with ε = 0.
    x = torch.ones(4, 3, requires_grad=True)
    optimizer = cls([x], lr=0.1, eps=0.0, weight_decay=0.0, backend=backend)
    for _ in range(3):
        x.grad = torch.zeros(4, 3)
        x.grad[1] = torch.tensor([1.0, -2.0, 3.0])
        optimizer.step()
    assert torch.equal(x[0], torch.ones(3))
    assert bool((x[1] != 1).all())
    assert all_finite(optimizer, [x])


@every_backend
@every_rule
def test_nothing_at_all(name: str, backend: str) -> None:
    x = torch.zeros(5, requires_grad=True)
    optimizer = build(name, [x], backend=backend)
    x.grad = torch.zeros(5)
    optimizer.step()
    assert not x.any()
    assert float(optimizer.trust_ratios()[0]) == 1


# ---- large and small ----


@every_backend
@every_rule
@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1e-30, 1e-20, 1e-10, 1e10, 1e18, 3e38])
@pytest.mark.parametrize("of", ["weights", "gradients"])
def test_every_magnitude_of_float32_stays_finite(name: str, backend: str, scale: float, of: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 30, generator=generator).clamp(-1, 1)
    x = (x * scale if of == "weights" else x).requires_grad_()
    before = x.detach().clone()
    optimizer = build(name, [x], backend=backend)
    for _ in range(3):
        g = torch.randn(40, 30, generator=generator).clamp(-1, 1)
        x.grad = g * scale if of == "gradients" else g
        optimizer.step()
        assert all_finite(optimizer, [x])
    ratio = float(optimizer.trust_ratios()[0])
    if scale == 3e38 and not (of == "weights" and name == "lamb-unadapted"):
        assert torch.equal(x, before)
        assert ratio != ratio
    elif 1e-10 <= scale <= 1e10:
        assert not torch.equal(x, before)
        assert 0 < ratio < INF


@every_backend
def test_weights_too_small_to_be_squared_count_as_zero(backend: str) -> None:
    x = torch.full((8,), 1e-30).requires_grad_()
    x.grad = torch.ones(8)
    optimizer = LAMB([x], lr=0.1, backend=backend)
    optimizer.step()
    assert float(optimizer.trust_ratios()[0]) == 1
    assert torch.allclose(x, torch.full((8,), -0.1))


@every_backend
@every_rule
def test_float16_weights_stop_at_their_largest_number(name: str, backend: str) -> None:
    x = torch.tensor([65504.0, -65504.0, 1000.0]).half().requires_grad_()
    optimizer = build(name, [x], backend=backend, weight_decay=0.0, lr=100.0 if "unadapted" in name else 0.5)
    for _ in range(3):
        x.grad = torch.tensor([-1000.0, 1000.0, -60000.0]).half()
        x.grad = -x.grad if OPTIMIZERS[name][1].get("maximize") else x.grad
        optimizer.step()
        assert bool(x.isfinite().all())
    assert x[:2].tolist() == [65504.0, -65504.0]
    assert x[2] > 1000


@every_backend
@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)], ids=str)
def test_a_master_copy_half_way_is_rounded_to_the_even_number(dtype: torch.dtype, unit: float, backend: str) -> None:
    halves = torch.arange(0.5, 64) * unit
    subnormal = torch.tensor([2.0**-24, 1.5 * 2**-24])
    master = torch.cat([1 + halves, -1 - halves, (1 + halves) * 2.0**-13, subnormal])
    x = torch.zeros(len(master), dtype=dtype, requires_grad=True)
    x.grad = torch.zeros_like(x)
    optimizer = LAMB([x], weight_decay=0.0, backend=backend, master_weights=True)
    optimizer.step()
    optimizer.state[x]["master_param"].copy_(master)
    optimizer.step()
    assert torch.equal(optimizer.state[x]["master_param"], master)
    assert torch.equal(x, master.to(dtype))
    assert x[:4].tolist() == [1, 1 + 2 * unit, 1 + 2 * unit, 1 + 4 * unit]


@every_backend
def test_float16_extremes_keep_their_norms(backend: str) -> None:
    # 65,504² and the square of the smallest subnormal, 6e-8, are far outside of float16 and well inside of float32.
    for value in (65504.0, 2**-14, 2**-24):
        x = torch.full((64, 64), value).half().requires_grad_()
        x.grad = torch.full((64, 64), value).half()
        optimizer = LAMB([x], lr=0.0, eps=0.0, weight_decay=0.0, backend=backend)
        optimizer.step()
        # ‖x‖ = 64·value, and ‖u‖ = 64: u = 1 up to float32 roundings of g² and its root
        assert float(optimizer.trust_ratios()[0]) == pytest.approx(value, rel=1e-5)


def test_the_on_device_path_equals_the_one_that_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: dict[str, list[torch.Tensor]] = {}
    for name in OPTIMIZERS:
        looked[name] = layers()
        run(build(name, looked[name], backend="foreach"), looked[name], 2)
    monkeypatch.setattr(foreach, "on_host", lambda a: False)
    for name in OPTIMIZERS:
        params = layers()
        run(build(name, params, backend="foreach"), params, 2)
        assert largest_difference(params, looked[name]) == 0, name
