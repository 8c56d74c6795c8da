"""The Triton kernels equal the reference: interpreted on the CPU, compiled where there is a GPU.

Guards what only they can get wrong: descriptors that outlive what they describe, chunks and their tails, the order of
sums, the rounding of states and masters. Without a GPU the kernels are also compiled for two, to machine code.
"""

import itertools
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from optim_cases import OPTIMIZERS, build, give_gradients, largest_difference, layers, run
from torch import Tensor

from largebatch import LAMB
from largebatch.bench.peers import parameters, shapes_of
from largebatch.optim import backends
from largebatch.optim.precision import Origin

triton = pytest.importorskip("triton")
from largebatch.optim import triton as backend  # noqa: E402
from largebatch.optim import triton_kernels as kernels  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's NumPy tells of inf and NaN
INTERPRETED = backend.interpreted()
CLOSE = {torch.float64: 200 * 2**-52, torch.float32: 200 * 2**-23}  # as in test_backends.py


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("Triton compiles here; set TRITON_INTERPRET=1 to interpret")
    monkeypatch.setattr(backend, "CHUNK", 512)
    monkeypatch.setattr(backend, "BLOCK", 256)
    monkeypatch.setattr(backend, "SMALL_CHUNK", 512)
    monkeypatch.setattr(backend, "SMALL_BLOCK", 256)
    monkeypatch.setattr(backend, "SHARES", 4)
    return request.param


@pytest.fixture(params=["three-launches", "one-launch"])
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.BACKEND, "one_launch", request.param == "one-launch")


def on(device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [x.detach().to(device).requires_grad_() for x in layers(dtype)]


def walk(name: str, params: list[Tensor], steps: int, **settings: object) -> torch.optim.Optimizer:
    settings = {**OPTIMIZERS[name][1], **settings}
    if isinstance(settings["lr"], Tensor):
        settings["lr"] = settings["lr"].to(params[0].device)
    optimizer = build(name, params, **settings)
    run(optimizer, params, steps)
    return optimizer


FEW = ["lamb", "lamb-decoupled", "lamb-bounded", "lamb-callable", "lamb-linf", "nnlamb-capturable", "lars-nesterov",
       "lars-tuned", "lars2017-nesterov"]  # fmt: skip
MANY = [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in OPTIMIZERS]


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", MANY)
@pytest.mark.usefixtures("launches")
def test_equals_the_reference(name: str, dtype: torch.dtype, device: str) -> None:
    params, twins = on(device, dtype), on(device, dtype)
    fast, slow = walk(name, params, 3, backend="triton"), walk(name, twins, 3, backend="reference")
    assert fast.backend == "triton"
    assert largest_difference(params, twins) < CLOSE[dtype]
    assert largest_difference(params, on(device, dtype)) > 1e-3, "the steps moved nothing"
    for x, y in zip(params, twins, strict=True):
        for key, value in fast.state[x].items():
            assert value.stride() == slow.state[y][key].stride()
            assert not value.numel() or largest_difference([value], [slow.state[y][key]]) < CLOSE[dtype]
    for key, ratio in fast.trust_ratios().items():
        assert float(ratio) == pytest.approx(float(slow.trust_ratios()[key]), rel=CLOSE[dtype])


@pytest.mark.parametrize("settings", [{}, {"master_weights": True}, {"state_dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.usefixtures("launches")
def test_narrow_types_round_as_the_reference_does(dtype: torch.dtype, settings: dict, device: str) -> None:
    # One step, of which each value is rounded once: to another neighbour only where the two float32 values before it,
    # which differ in the last place, lie on two sides of a boundary: one in 2^16 for the state, 2^13 for float16.
    params, twins = on(device, dtype), on(device, dtype)
    fast, slow = (
        walk("lamb", params, 1, backend="triton", **settings),
        walk("lamb", twins, 1, backend="reference", **settings),
    )
    for x, y in zip(params, twins, strict=True):
        for ours, theirs in [(x, y), *((fast.state[x][key], slow.state[y][key]) for key in slow.state[y])]:
            differ = (ours.detach().double() - theirs.detach().double()).abs() > 2**-21 * theirs.detach().double().abs()
            assert ours.dtype is theirs.dtype
            assert int(differ.sum()) <= 0.005 * x.numel() + 1


@pytest.mark.usefixtures("launches")
def test_layers_that_end_near_the_end_of_a_block_or_chunk(device: str) -> None:
    def made() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        sizes = [size + beyond for size in (256, 512, 1024) for beyond in (-1, 0, 1)]
        return [torch.randn(size, generator=generator).to(device).requires_grad_() for size in (1, *sizes)]

    params, twins = made(), made()
    fast, slow = walk("lamb", params, 1, backend="triton"), walk("lamb", twins, 1, backend="reference")
    assert largest_difference(params, twins) < CLOSE[torch.float32]
    assert largest_difference(params, made()) > 1e-3
    for key, ratio in fast.trust_ratios().items():
        assert float(ratio) == pytest.approx(float(slow.trust_ratios()[key]), rel=CLOSE[torch.float32])


@pytest.mark.usefixtures("launches")
def test_two_runs_are_the_same_bits(device: str) -> None:
    params, twins = on(device), on(device)
    walk("nnlamb", params, 2, backend="triton")
    walk("nnlamb", twins, 2, backend="triton")
    assert all(torch.equal(x, y) for x, y in zip(params, twins, strict=True))


@pytest.mark.usefixtures("launches")
def test_what_moved_in_memory_is_found_again(device: str) -> None:
    params, twins = on(device), on(device)
    optimizers = [LAMB(params, lr=1e-2, backend="triton"), LAMB(twins, lr=1e-2, backend="reference")]
    kept = []
    for step in range(3):
        for optimizer, xs in zip(optimizers, (params, twins), strict=True):
            give_gradients(xs, step)
            optimizer.step()
        kept.append([x.data for x in params])
        for x in params:
            x.data = x.data.clone()  # the old place stays filled with the old weights
            kept.append(x.grad)
    assert largest_difference(params, twins) < CLOSE[torch.float32]
    assert largest_difference(kept[0], params) > 1e-3


@pytest.mark.parametrize(
    ("name", "reads_g"),
    [("lamb", False), ("nlamb", True), ("nnlamb", True), ("lars", False), ("lars-nesterov", True), ("lars2017", True)],
)
def test_what_the_compiled_kernels_are_told(name: str, reads_g: bool, device: str) -> None:
    # Whether 16 bytes can be read at once, and whether the second pass has to read the gradient.
    for offset in (0, 1, 4):
        x = torch.randn(40, device=device)[offset : offset + 16].requires_grad_()
        optimizer = build(name, [x], backend="triton")
        run(optimizer, [x], 1)
        give_gradients([x], 1)
        (gathered,) = optimizer._layers_by_device()
        gathered.spread()
        (part,) = gathered.memo
        assert backend.types(part)["aligned"] is (offset % 4 == 0)
        assert backend.second_pass(optimizer.rule, part, gathered)["reads_g"] is reads_g


@pytest.mark.usefixtures("launches")
def test_autograd_sees_that_the_weights_changed(device: str) -> None:
    x = torch.randn(5, device=device).requires_grad_()
    loss = (x * x).sum()
    x.grad = torch.ones_like(x)
    LAMB([x], backend="triton").step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.usefixtures("launches")
def test_neither_gradients_nor_copies_are_kept(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(6, 14, device=device)[:, ::2].requires_grad_()  # of which the kernels move a copy
    x.grad = torch.randn(6, 7, device=device)
    seen: list[weakref.ref[Tensor]] = []
    aligned = backend.aligned

    def spy(*arguments: object) -> list[Tensor]:
        made = aligned(*arguments)
        seen.extend(map(weakref.ref, made))
        return made

    monkeypatch.setattr(backend, "aligned", spy)
    optimizer = LAMB([x], backend="triton")
    optimizer.step()
    x.grad = None
    kept = {id(state) for state in optimizer.state[x].values()}
    assert len(seen) == 5
    assert all(ref() is None or id(ref()) in kept for ref in seen)


@pytest.mark.usefixtures("launches")
def test_groups_and_shards_keep_their_numbers(device: str) -> None:
    # Each group has numbers of its own, and a shard rounds by where it lies in the whole layer.
    def trained(backend: str) -> tuple[list[Tensor], LAMB]:
        params = on(device)
        groups = [
            {"params": params[::2]},
            {"params": params[1::2], "lr": 3e-2, "betas": (0.5, 0.9), "weight_decay": 0.5, "adapt": False},
        ]
        optimizer = LAMB(groups, lr=1e-2, state_dtype=torch.bfloat16, backend=backend)
        run(optimizer, params, 1)
        give_gradients(params, 1)
        (gathered,) = optimizer._layers_by_device()
        for position, layer in enumerate(gathered):
            layer.origin = Origin(start=100 + position, run=5, skip=11)
        optimizer.step()
        return params, optimizer

    (params, fast), (twins, slow) = trained("triton"), trained("reference")
    assert largest_difference(params, twins) < CLOSE[torch.float32]
    for x, y in zip(params, twins, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            differ = fast.state[x][key] != slow.state[y][key]
            assert int(differ.sum()) <= 0.005 * x.numel() + 1


@pytest.mark.parametrize("name", ["lamb", "lamb-callable"])
@pytest.mark.usefixtures("launches")
def test_kernels_are_launched_on_the_device_of_the_layers(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Triton launches on the current device, which on a machine with several is not always that of the layers.
    params, current, launched = on(device), [], {}

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        current.append(tensor)
        yield
        current.pop()

    def spy(pass_over: str, of_backend: Callable[..., object]) -> Callable[..., object]:
        return lambda *arguments: [launched.update({pass_over: list(current)}), of_backend(*arguments)][1]

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for pass_over in ("_direct", "_descend", "_whole"):
        monkeypatch.setattr(backend.BACKEND, pass_over, spy(pass_over, getattr(backend.BACKEND, pass_over)))
    walk(name, params, 1, backend="triton")
    in_one = backend.BACKEND.one_launch and name == "lamb"
    assert launched.keys() == ({"_whole"} if in_one else {"_direct", "_descend"})
    assert all([x is params[0] for x in tensors] == [True] for tensors in launched.values())


@pytest.mark.usefixtures("launches")
def test_a_layer_with_a_bad_gradient_waits(device: str) -> None:
    params, twins = on(device), on(device)
    optimizers = [LAMB(params, lr=1e-2, backend="triton"), LAMB(twins, lr=1e-2, backend="reference")]
    for optimizer, xs in zip(optimizers, (params, twins), strict=True):
        give_gradients(xs, 0)
        xs[0].grad[3, 3] = torch.nan
        xs[1].grad[0] = torch.inf
        xs[5].grad[0, 0, 0, 0] = 1e30  # whose square is not finite
        optimizer.step()
    start = on(device)
    assert all(torch.equal(params[i], start[i]) for i in (0, 1, 5))
    assert all(optimizers[0].trust_ratios()[i].isnan() for i in (0, 1, 5))
    assert largest_difference(params, twins) < CLOSE[torch.float32]
    assert all(value.isfinite().all() for state in optimizers[0].state.values() for value in state.values())


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_bert_embedding_agrees_with_float64(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As in test_norms.py. Interpreted, 239 large chunks of one block take a fiftieth of the time of 1,908 of eight.
    if where == "cpu":
        if not INTERPRETED:
            pytest.skip("Triton compiles here; set TRITON_INTERPRET=1 to interpret")
        monkeypatch.setattr(backend, "CHUNK", 2**17)
        monkeypatch.setattr(backend, "BLOCK", 2**17)
    x = (0.02 * torch.randn(30522, 1024)).to(where).requires_grad_()
    exact = sum(float(part.double().square().sum()) for part in x.detach().split(1024)) ** 0.5
    x.grad = torch.ones_like(x)  # u = 1 everywhere: ‖u‖ = √n
    optimizer = LAMB([x], lr=0.0, eps=0.0, weight_decay=0.0, backend="triton")
    optimizer.step()
    assert float(optimizer.trust_ratios()[0]) == pytest.approx(exact / x.numel() ** 0.5, rel=1e-6)


def test_tasks_wait_only_for_tasks_before_them() -> None:
    num_chunks = [3, 0, 1, 1, 7, 2]
    for lag in (1, 4, 100):
        order = backend.tasks(num_chunks, lag)
        assert sorted(order) == list(range(2 * sum(num_chunks)))
        for first, num in zip(itertools.accumulate(num_chunks, initial=0), num_chunks, strict=False):
            directs, again = ([order.index(2 * chunk + k) for chunk in range(first, first + num)] for k in (0, 1))
            assert max(directs, default=0) <= min(again, default=0)
            assert again == sorted(again, reverse=True)
    assert backend.tasks([2, 2, 2], lag=2) == [0, 2, 4, 6, 3, 1, 8, 10, 7, 5, 11, 9]


@pytest.mark.parametrize("phi", [None, torch.sqrt], ids=["clipped-by-nothing", "callable"])
@pytest.mark.usefixtures("launches")
def test_a_gradient_scaler_does_not_wait_for_it(phi: object, device: str) -> None:
    # torch's scaler asks the device whether to take a step, unless the optimizer says that it looks by itself.
    params, twins = on(device), on(device)
    skips = LAMB(params, lr=1e-2, phi=phi, backend="triton", capturable=True)
    waits = LAMB(twins, lr=1e-2, phi=phi, backend="reference", capturable=True)
    calls = {skips: 0, waits: 0}
    for optimizer in calls:
        optimizer.register_step_pre_hook(lambda which, *_: calls.update({which: calls[which] + 1}))
    scalers = [torch.amp.GradScaler(device, init_scale=2.0**12, growth_interval=2) for _ in calls]
    for step in range(5):
        for scaler, optimizer, xs in zip(scalers, (skips, waits), (params, twins), strict=True):
            scale = scaler.scale(torch.ones((), device=device))
            give_gradients(xs, step)
            for x in xs:
                x.grad *= scale
            if step == 2:
                xs[2].grad.view(-1)[0] = torch.inf
                before = [x.detach().clone() for x in xs]
            if step == 3:
                scaler.unscale_(optimizer)  # as before clipping
            scaler.step(optimizer)
            scaler.update()
            if step == 2:
                assert all(torch.equal(x, y) for x, y in zip(xs, before, strict=True))
                assert all(ratio.isnan() for i, ratio in skips.trust_ratios().items() if params[i].numel())
    assert calls == {skips: 5, waits: 4}
    assert scalers[0].get_scale() == scalers[1].get_scale()
    assert all(float(skips.state[x]["step"]) == 4 for x in params)
    assert largest_difference(params, twins) < CLOSE[torch.float32]
    assert largest_difference(params, on(device)) > 1e-3


def test_a_scaler_waits_where_the_host_counts_the_steps(device: str) -> None:
    params = on(device)
    give_gradients(params, 0)
    optimizer = LAMB(params, backend="triton")
    optimizer.found_inf = torch.ones((), device=device)  # which nobody sets who asked
    optimizer.step()
    assert not optimizer._step_supports_amp_scaling
    assert largest_difference(params, on(device)) > 1e-4


@pytest.mark.gpu
@pytest.mark.usefixtures("launches")
def test_a_cuda_graph_holds_the_step() -> None:
    params, twins = on("cuda"), on("cuda")
    rate = torch.tensor(1e-2, device="cuda")
    graphed, plain = (LAMB(xs, lr=rate, backend="triton", capturable=True) for xs in (params, twins))
    grads = [torch.zeros_like(x) for x in params]
    for x, g in zip(params, grads, strict=True):
        x.grad = g
    start = [x.detach().clone() for x in params]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graphed.step()  # zero gradients and state: warms up, and decays the weights
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graphed.step()
    with torch.no_grad():
        for x, value in zip(params, start, strict=True):
            x.copy_(value)
            for state in graphed.state[x].values():
                state.zero_()
    for step in range(5):
        rate.fill_(1e-2 / (1 + step))
        give_gradients(twins, step)
        for g, y in zip(grads, twins, strict=True):
            g.copy_(y.grad)
        graph.replay()
        plain.step()
    assert all(torch.equal(x, y) for x, y in zip(params, twins, strict=True))
    assert largest_difference(params, start) > 1e-3


def test_tables_are_sent_again_only_where_something_changed(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    params = [torch.randn(size, device=device).requires_grad_() for size in (700, 33, 1024)]
    optimizer = LAMB(params, lr=1e-2, backend="triton")
    sent: list[tuple[int, ...]] = []
    send = backend.BACKEND._send

    def count(table: Tensor, device: torch.device) -> Tensor:
        sent.append(tuple(table.shape))
        return send(table, device)

    monkeypatch.setattr(backend.BACKEND, "_send", count)
    table, num_chunks = (3, kernels.WIDTH.value), 2 + 1 + 2  # of 512 elements
    for what, expected in (
        ("at first", [(num_chunks,), table]),
        ("nothing", []),
        ("a gradient lies elsewhere", [table]),
        ("one launch", [(2 * num_chunks,)]),
        ("a capture has sent them", [(num_chunks,), (2 * num_chunks,), table]),
    ):
        if what == "at first":
            give_gradients(params, 0)
        if what == "a gradient lies elsewhere":
            params[0].grad = params[0].grad.clone()
        if what == "one launch":
            monkeypatch.setattr(backend.BACKEND, "one_launch", True)
        if what == "a capture has sent them":
            (of_device,) = optimizer._gathered.by_device.values()
            of_device.memo[0].of_graph = True
        sent.clear()
        optimizer.step()
        *tables, _ = sent  # the numbers go at every step
        assert tables == expected, what


@pytest.mark.gpu
@pytest.mark.parametrize("one_launch", [False, True], ids=["three-launches", "one-launch"])
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16], ids=str)
def test_layers_of_a_real_model_at_the_real_sizes(
    one_launch: bool, state_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BERT-mini, its chunks and programs as in training: equal to the reference, and to the bit from run to run."""
    monkeypatch.setattr(backend.BACKEND, "one_launch", one_launch)
    found = []
    for name in ("triton", "triton", "reference"):
        torch.manual_seed(0)
        params = parameters(shapes_of("bert-mini"), torch.device("cuda"))
        optimizer = LAMB(params, lr=1e-3, backend=name, state_dtype=state_dtype)
        for _ in range(20):
            optimizer.step()
        found.append(params)
    assert all(torch.equal(x, y) for x, y in zip(*found[:2], strict=True))
    # Where a bfloat16 state is rounded the other way, by 2^-8 of itself, u moves by as much, and x by that times lr.
    assert largest_difference(found[0], found[2]) < (CLOSE[torch.float32] if state_dtype is None else 1e-3)


COMPILE = """
import itertools, torch, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from largebatch import LAMB
from largebatch.optim import triton_kernels as kernels

pointers = {"rows": "*i64", "chunks": "*i32", "hypers": "*fp64"}
pointers |= {"shares": "*fp32", "totals": "*fp64", "ratios": "*fp64", "tasks": "*i32", "counters": "*i32"}

def build(kernel, capability, **constants):
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8}).asm

common = {"compute": tl.float32, "aligned": True, "size": 16384, "block": 2048}
for capability, rule in itertools.product((80, 90), ("lamb", "lars", "lars2017")):
    types = {"x_type": tl.float32, "g_type": tl.bfloat16, "state_type": tl.float32, **common}
    code = build(kernels.direct, capability, rule=rule, norm="l2", **types)
    assert ".v4" in code["ptx"], "no 16 bytes at a time"
    second = {"rounded_type": tl.float16, "rounds": True, "reads_g": True}
    code = build(kernels.descend, capability, rule=rule, **second, **types)
    assert len(code["cubin"]) > 10_000
    code = build(
        kernels.whole, capability, rule=rule, norm="l2", shares_block=1024, total_type=tl.float64, **second, **types
    )
    assert all(f"gpu.{order}." in code["ptx"] for order in ("acquire", "release", "acq_rel")), "nothing orders them"
build(kernels.settle, 90, norm="l2", size=16384, block=1024, dtype=tl.float64)
types = {"x_type": tl.bfloat16, "g_type": tl.float16, "state_type": tl.bfloat16, **common, "aligned": False}
build(kernels.direct, 90, rule="lamb", norm="linf", **types)

try:
    LAMB([torch.nn.Parameter(torch.ones(3))], backend="triton")
except ValueError as error:
    print(error)
"""


def test_the_kernels_compile_for_gpus_and_refuse_the_cpu() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "needs parameters on a CUDA device, and one is on cpu" in done.stdout


def test_auto_does_not_take_it_on_a_cpu() -> None:
    assert backends.choose("auto", "lamb", layers(torch.float32)).name != "triton"
