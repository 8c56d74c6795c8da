"""The native backend computes the same whoever computes, follows tensors that are exchanged, and knows its place.

Guards against results that depend on the instruction set or the number of threads, addresses that outlive what lay
there, temporaries of the size of the model, and a fallback that nobody hears of.
"""

import gc
import logging
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from optim_cases import build, give_gradients, largest_difference, layers, run
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from largebatch import LAMB, LARS, NNLAMB, compiled
from largebatch.optim import backends

native = pytest.importorskip("largebatch.optim.native", exc_type=ImportError)  # a machine without a compiler
library = native.library

CLOSE = 200 * 2**-23  # as in test_native.py
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    compiled.choose(native.BACKEND.library, os.environ.get(compiled.ISA_VARIABLE))


def fingerprint(optimizer: Optimizer, params: list[Tensor]) -> list[Tensor]:
    """Return everything that a step leaves behind."""
    return (
        [x.detach() for x in params]
        + [v for state in optimizer.state.values() for v in state.values()]
        + list(optimizer.trust_ratios().values())
    )


def moments(optimizer: Optimizer) -> list[Tensor]:
    return [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- who computes ----


def steps_on(isa: str, name: str, dtype: torch.dtype, **settings: object) -> tuple[Optimizer, list[Tensor]]:
    if compiled.choose(native.BACKEND.library, isa) != isa:
        pytest.skip(f"this processor has no {isa}")
    params = layers(dtype)
    optimizer = build(name, params, backend="native", **settings)
    run(optimizer, params, 5)
    return optimizer, params


@pytest.mark.parametrize("isa", ["avx512", "baseline"])
@pytest.mark.parametrize("name", ["lamb", "nnlamb", "lars-nesterov", "lars2017-nesterov", "lamb-linf"])
def test_every_instruction_set_computes_the_same(name: str, isa: str) -> None:
    # The same bits where both have fused multiply-adds. The baseline has none, and the state of LAMB needs none.
    prints = []
    for dtype in (torch.float32, *HALVES):
        for settings in ({}, {} if name.startswith("lars") else {"state_dtype": torch.bfloat16}):
            ours, params = steps_on(isa, name, dtype, **settings)
            theirs, others = steps_on("avx2", name, dtype, **settings)
            prints.append(fingerprint(ours, params))
            if isa != "baseline":
                assert same_bits(prints[-1], fingerprint(theirs, others))
            elif dtype is torch.float32:
                assert largest_difference(params, others) < CLOSE
            if "lamb" in name:
                assert same_bits(moments(ours), moments(theirs))
    assert not same_bits(prints[0], prints[1]) or name.startswith("lars")


@pytest.mark.parametrize("name", ["lamb", "lars2017", "lamb-l1", "lamb-callable"])
def test_results_do_not_depend_on_the_number_of_threads(name: str) -> None:
    sizes = (5, 2**15 + 3, 2**16 - 1, 2**16, 5 * 2**16 + 7, 1000, 2**17 + 1)  # alone, shared, and between
    prints = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(0)
        params = [torch.randn(size, generator=generator).requires_grad_() for size in sizes]
        optimizer = build(name, params, backend="native")
        run(optimizer, params, 3)
        prints.append(fingerprint(optimizer, params))
    assert all(same_bits(prints[0], other) for other in prints[1:])


def test_the_threads_are_torchs() -> None:
    """A pool of its own would compete with torch's, both waiting in busy loops."""
    code = """
import os, torch
from largebatch import LAMB
torch.set_num_threads(3)
x = torch.randn(2**20, requires_grad=True)
x.grad = torch.randn(2**20)
optimizer = LAMB([x], backend="native")
x.detach().mul(2)  # wakes torch's threads
before = len(os.listdir("/proc/self/task"))
for _ in range(3):
    optimizer.step()
print(before, len(os.listdir("/proc/self/task")))
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("counts threads in /proc")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    before, after = map(int, result.stdout.split())
    assert before == after >= 3


# ---- what a table must not outlive ----


def swap_data(optimizer: LAMB, x: Tensor) -> None:
    x.data = x.data.clone()


def swap_state(optimizer: LAMB, x: Tensor) -> None:
    optimizer.state[x]["exp_avg"] = optimizer.state[x]["exp_avg"].clone()


def swap_step(optimizer: LAMB, x: Tensor) -> None:
    optimizer.state[x]["step"] = optimizer.state[x]["step"].clone()


def reload(optimizer: LAMB, x: Tensor) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def grow(optimizer: LAMB, x: Tensor) -> None:
    y = torch.ones(3, requires_grad=True)
    y.grad = torch.ones(3)
    optimizer.add_param_group({"params": [y]})


def leave_out_one(optimizer: LAMB, x: Tensor) -> None:
    optimizer.param_groups[0]["params"][2].grad = None
    optimizer.step()


def share_state(optimizer: LAMB, x: Tensor) -> None:
    optimizer.state[x]["exp_avg"].share_memory_()


def share_step(optimizer: LAMB, x: Tensor) -> None:
    optimizer.state[x]["step"].share_memory_()


def swap_data_of_state(optimizer: LAMB, x: Tensor) -> None:
    for value in optimizer.state[x].values():
        value.data = value.data.clone()


def transpose(optimizer: LAMB, x: Tensor) -> None:
    """The address stays."""
    square = torch.arange(16.0).view(4, 4).requires_grad_()
    square.grad = torch.ones(4, 4)
    optimizer.add_param_group({"params": [square]})
    optimizer.step()
    square.data = square.data.t()
    square.grad = torch.ones(4, 4)


@pytest.fixture(params=[True, False])
def _located(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's own description of tensors, and as if this version had none."""
    if not request.param:
        monkeypatch.setattr(native.BACKEND.locate, "describe", None)
    elif native.BACKEND.locate.describe is None:
        pytest.skip("this version of torch does not describe tensors in C")


@pytest.mark.usefixtures("_located")
@pytest.mark.parametrize(
    "change",
    [
        *(swap_data, swap_state, swap_step, reload, grow, leave_out_one),
        *(share_state, share_step, swap_data_of_state, transpose),
    ],
)
def test_tensors_that_are_exchanged_between_steps_are_seen(change: Callable[[LAMB, Tensor], None]) -> None:
    moved, states = [], []
    for backend in ("native", "reference"):
        params = layers(torch.float32)
        optimizer = LAMB(params, lr=1e-2, backend=backend)
        run(optimizer, params, 2)
        change(optimizer, params[0])
        run(optimizer, params, 2, first=2)
        moved.append([x for group in optimizer.param_groups for x in group["params"]])
        states.append([value for x in moved[-1] for value in optimizer.state[x].values()])
    assert largest_difference(*moved) < CLOSE
    assert largest_difference(*states) < CLOSE


@pytest.mark.usefixtures("_located")
def test_gradients_of_other_layouts_from_step_to_step_are_seen() -> None:
    """A transposed one, one of rows in the same memory, one in a larger tensor; the same bits as of copies."""
    shapes = [
        lambda g: g,
        lambda g: g.t().clone().t(),
        lambda g: g[:1].expand(6, 4),
        lambda g: torch.cat([g, g])[:6],
        lambda g: g,
    ]
    moved = []
    for backend, copies in (("native", False), ("native", True), ("reference", False)):
        torch.manual_seed(0)
        params = [torch.randn(6, 4).requires_grad_() for _ in range(3)]
        optimizer = LAMB(params, lr=1e-2, backend=backend)
        for shape in shapes:
            for x in params:
                x.grad = torch.randn(6, 4)
            last = shape(params[-1].grad)
            params[-1].grad = last.contiguous() if copies else last
            optimizer.step()
        moved.append(params)
    assert same_bits(moved[0], moved[1])
    assert largest_difference(moved[0], moved[2]) < CLOSE


@pytest.mark.usefixtures("_located")
def test_sparse_gradients_are_refused_after_dense_ones() -> None:
    x = torch.randn(6, 4).requires_grad_()
    optimizer = LAMB([x], backend="native")
    x.grad = torch.randn(6, 4)
    optimizer.step()
    before, x.grad = x.detach().clone(), torch.randn(6, 4).to_sparse()
    with pytest.raises(ValueError, match="sparse gradients are not supported"):
        optimizer.step()
    assert torch.equal(x, before)


def test_addresses_are_given_only_where_all_is_as_expected() -> None:
    locate, base = native.BACKEND.locate, torch.randn(12, 8)
    if locate.describe is None:
        pytest.skip("this version of torch does not describe tensors in C")
    tensors = [base, base[3:, 1:], base.t(), base[0, 0], base[:0], torch.nn.Parameter(base.half()), base.bfloat16()]
    dtypes, strides = [x.dtype for x in tensors], [x.stride() for x in tensors]
    expected = native.locate.Layouts(dtypes, [x.shape for x in tensors], strides)
    assert locate(tensors, expected).tolist() == [x.data_ptr() for x in tensors]
    assert locate([], native.locate.Layouts([], [], [])).tolist() == []
    for i, others in {
        0: [base.t(), base.half(), base.double(), base[None], base[0], base.to("meta"), base.to_sparse()],
        3: [base[0], torch.tensor(1)],
        6: [tensors[5], base[:, :1].bfloat16(), base[:5].bfloat16()],
    }.items():
        for other in others:
            assert locate([*tensors[:i], other, *tensors[i + 1 :]], expected) is None


@pytest.mark.usefixtures("_located")
@pytest.mark.parametrize("move", [lambda x: x.share_memory_(), lambda x: setattr(x, "data", x.data.clone())])
def test_weights_that_move_away_from_their_master_are_seen(move: Callable[[Tensor], object]) -> None:
    x = torch.ones(64, dtype=torch.bfloat16).requires_grad_()
    optimizer = LAMB([x], lr=0.1, master_weights=True, backend="native")
    x.grad = torch.ones_like(x)
    optimizer.step()
    move(x)
    optimizer.step()
    assert torch.equal(x, optimizer.state[x]["master_param"].bfloat16())


@pytest.mark.usefixtures("_located")
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda x, _: setattr(x, "data", torch.cat([x.data, x.data])), "state"),
        (lambda x, _: setattr(x, "data", x.data[:2]), "state"),
        (lambda _, state: state.update(exp_avg=torch.zeros(5, 3)), "state"),
        (lambda x, state: [state.clear(), setattr(x, "data", x.data[:2])], "gradient"),
    ],
)
def test_what_belongs_to_another_shape_is_refused(change: Callable[[Tensor, dict], object], what: str) -> None:
    x = torch.ones(4, 3).requires_grad_()
    x.grad = torch.ones(4, 3)
    optimizer = LAMB([x], backend="native")
    optimizer.step()
    change(x, optimizer.state[x])
    with pytest.raises(ValueError, match=rf"the {what} of parameter 0 has the shape \[\d, 3\], and the parameter"):
        optimizer.step()


@pytest.mark.parametrize("backend", ["native", "foreach", "reference"])
def test_a_gradient_that_is_only_marked_negative_is_read_as_such(backend: str) -> None:
    a, b = (torch.tensor(0.5).requires_grad_() for _ in range(2))
    optimizer = LAMB([b], lr=0.1, backend=backend)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = ((torch.complex(a, b).conj() * (1 + 2j)) - (3 + 1j)).abs().square()
        loss.backward()
        assert b.grad is not None
        assert b.grad.is_neg()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]


def test_the_default_device_and_dtype_are_not_used() -> None:
    moved = []
    for device, dtype in (("cpu", torch.float32), ("meta", torch.bfloat16)):
        params = layers(torch.float32)
        give_gradients(params, 0)
        optimizer = LAMB(params, lr=1e-2, backend="native", state_dtype=torch.bfloat16)
        try:
            torch.set_default_device(device)
            torch.set_default_dtype(dtype)
            optimizer.step()
        finally:
            torch.set_default_device("cpu")
            torch.set_default_dtype(torch.float32)
        moved.append(params)
    assert same_bits(*moved)


def test_a_cycle_through_the_weights_is_collected() -> None:
    """As of a hook that reads the optimizer."""

    def train() -> weakref.ref[Tensor]:
        x = torch.ones(3).requires_grad_()
        optimizer = LAMB([x], backend="native")
        x.register_hook(lambda g: print(optimizer) or g)
        x.grad = torch.ones(3)
        optimizer.step()
        return weakref.ref(x)

    weight = train()
    gc.collect()
    assert weight() is None


def test_tensors_without_memory_are_left_to_others() -> None:
    with FakeTensorMode():
        assert LAMB([torch.nn.Parameter(torch.ones(3))]).backend == "foreach"
        with pytest.raises(ValueError, match="one is of a FakeTensorMode"):
            LAMB([torch.nn.Parameter(torch.ones(3))], backend="native")


def test_gradients_are_not_kept() -> None:
    x = torch.randn(100).requires_grad_()
    x.grad = torch.randn(100)
    optimizer = LAMB([x], backend="native")
    optimizer.step()
    gone = weakref.ref(x.grad)
    x.grad = None
    assert gone() is None


def test_autograd_sees_that_the_weights_changed() -> None:
    x = torch.randn(5).requires_grad_()
    loss = (x * x).sum()
    x.grad = torch.ones(5)
    LAMB([x], backend="native").step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_step_allocates_nothing_of_the_size_of_the_model() -> None:
    params = [torch.randn(1000, 1000).requires_grad_(), torch.randn(5).requires_grad_()]
    give_gradients(params, 0)
    for optimizer in (
        LAMB(params, backend="native"),
        NNLAMB(params, backend="native", state_dtype=torch.bfloat16),
        LARS(params, lr=0.1, backend="native"),
    ):
        optimizer.step()
        with torch.profiler.profile(profile_memory=True) as profile:
            optimizer.step()
        alive = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                alive += event.nbytes()
                peak = max(peak, alive)
        assert 0 < peak < 4096, "more than the ratios"


# ---- when it serves, and when not ----


def test_auto_takes_it_for_what_it_can_move() -> None:
    for dtype in (torch.float32, *HALVES):
        assert LAMB(layers(dtype)).backend == LARS(layers(dtype), lr=1.0).backend == "native"
    assert LAMB(layers(torch.float64)).backend == "foreach"
    assert LAMB([*layers(torch.float32), *layers(torch.float64)]).backend == "foreach"
    assert LAMB([torch.ones(2, device="meta", requires_grad=True)]).backend == "foreach"
    optimizer = LAMB(layers(torch.float32))
    optimizer.add_param_group({"params": layers(torch.float64)})
    assert optimizer.backend == "foreach"


def test_what_it_cannot_move_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"backend='native' cannot serve here: .* and one is torch.float64"):
        LAMB(layers(torch.float64), backend="native")
    with pytest.raises(ValueError, match=r"dense parameters on the CPU, and one is torch.strided on meta"):
        LAMB([torch.ones(2, device="meta", requires_grad=True)], backend="native")


def test_parameters_that_change_dtype_after_the_optimizer_was_made() -> None:
    x = torch.ones(4, requires_grad=True)
    optimizer = LAMB([x], lr=0.1)
    x.data = x.data.double()
    x.grad = torch.ones(4, dtype=torch.float64)
    optimizer.step()
    assert optimizer.backend == "foreach"
    y = torch.ones(4, requires_grad=True)
    y.grad = torch.ones(4)
    optimizer = LAMB([y], lr=0.1)
    optimizer.step()
    y.data = y.data.double()
    with pytest.raises(ValueError, match=r"backend='native' cannot go on: .* torch.float64"):
        optimizer.step()


def test_the_step_compiles_by_torch_operations() -> None:
    x = torch.ones(4, requires_grad=True)
    optimizer = LAMB([x])
    assert optimizer.backend == "native"
    assert optimizer._traceable_backend.name == "foreach"


def test_a_missing_library_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def missing(name: str) -> backends.Backend:
        if name == "native":
            raise ValueError("backend='native' is not available here: not compiled")
        return load(name)

    load = backends.load
    backends._native.cache_clear()
    monkeypatch.setattr(backends, "load", missing)
    with caplog.at_level(logging.WARNING):
        assert [LAMB(layers(torch.float32)).backend for _ in range(3)] == ["foreach"] * 3
    backends._native.cache_clear()
    (record,) = caplog.records
    said = "CPU optimizers run on torch operations, several times slower: "
    assert record.getMessage() == said + "backend='native' is not available here: not compiled"
    with pytest.raises(ValueError, match="not compiled"):
        LAMB(layers(torch.float32), backend="native")


def test_a_library_that_is_not_this_ones_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(library, "__file__", str(tmp_path / "library.py"))
        with pytest.raises(ImportError, match="the CPU kernel was not compiled when largebatch was installed"):
            library.load()
        (tmp_path / "kernels.so").write_bytes(b"built for another machine")
        with pytest.raises(ImportError, match=r"the CPU kernel cannot be loaded: .*kernels\.so"):
            library.load()
    for table in ("LAYER", "NUMBERS"):
        wider = np.dtype([*getattr(library, table).descr, ("more", np.float64)])
        with monkeypatch.context() as patch:
            patch.setattr(library, table, wider)
            with pytest.raises(ImportError, match="compiled from other sources than these"):
                library.load()
    assert library.load() is not native.BACKEND.library


def test_the_instruction_set_can_be_limited_from_outside() -> None:
    code = "from largebatch import compiled\nfrom largebatch.optim import native\n"
    code += "print(compiled.choose(native.BACKEND.library, None), end=' ')"
    for value, error in (("baseline", ""), ("sse9", "LARGEBATCH_NATIVE_ISA='sse9': expected 'baseline', 'avx2' or")):
        environment = {**os.environ, compiled.ISA_VARIABLE: value}
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
        )
        assert error in result.stderr
        assert (result.returncode == 0) is (not error)
