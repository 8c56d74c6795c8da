"""Every tensor that a model may have: empty, one number, strided, tied, or beyond 32 bits.

Guards against fast paths that assume a layout, a count of elements above zero, or that positions fit an int32.
"""

from collections.abc import Callable

import pytest
import torch
from optim_cases import BACKENDS, FLOAT32_BACKENDS, build, give_gradients, largest_difference, run
from torch import Tensor, nn

from largebatch import LAMB, NNLAMB, Layerwise, param_groups
from largebatch.optim import foreach, precision

RULES = ["lamb", "nnlamb-uncorrected", "lars-nesterov", "lars2017-nesterov"]

# Each makes a tensor of another layout with the values of a contiguous one.
LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "one number": ((), lambda a: a.clone()),
    "one element": ((1, 1, 1), lambda a: a.clone()),
    "transposed": ((20, 30), lambda a: a.t().contiguous().t()),
    "with holes": ((20, 30), lambda a: torch.empty(20, 60, dtype=a.dtype)[:, ::2].copy_(a)),
    "transposed, with holes": ((20, 30), lambda a: torch.empty(30, 40, dtype=a.dtype)[:, ::2].t().copy_(a)),
    "channels last": ((4, 5, 6, 7), lambda a: a.to(memory_format=torch.channels_last)),
    "channels last 3d": ((2, 3, 4, 5, 6), lambda a: a.to(memory_format=torch.channels_last_3d)),
    "a slice of a larger one": ((20, 30), lambda a: torch.cat([a, a])[20:].view(20, 30)),
    "a part of one storage": ((7,), lambda a: torch.cat([torch.zeros(3, dtype=a.dtype), a])[3:]),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_the_layout_does_not_matter(layout: str, name: str, backend: str) -> None:
    shape, lay_out = LAYOUTS[layout]
    values = torch.randn(shape, dtype=torch.float64)
    x, plain = lay_out(values).requires_grad_(), values.clone().requires_grad_()
    optimizer, twin = (build(name, [of], backend=backend) for of in (x, plain))
    for of, its in ((x, optimizer), (plain, twin)):
        run(its, [of], 3)
    # Another order of summation in two norms; a few units in the last place for each of three steps.
    assert largest_difference([x], [plain]) < 1e-14
    assert largest_difference([x], [values]) > 1e-3
    for key, value in optimizer.state[x].items():
        assert largest_difference([value], [twin.state[plain][key]]) < 1e-14


@pytest.mark.parametrize("backend", [*FLOAT32_BACKENDS, "triton"])
def test_states_round_alike_whatever_lies_in_another_order(backend: str) -> None:
    # Each bfloat16 is rounded by its place in memory. Gradients lie in another order than their weights, and several
    # are of one shape: a copy of one that is let go of too early would give its place to the next one's.
    if backend == "triton" and not pytest.importorskip("largebatch.optim.triton").interpreted():
        pytest.skip("Triton compiles here; set TRITON_INTERPRET=1 to interpret")

    def trained(backend: str) -> tuple[list[Tensor], torch.optim.Optimizer]:
        generator = torch.Generator().manual_seed(0)
        params = [
            lay_out(torch.randn(shape, generator=generator)).requires_grad_()
            for shape, lay_out in LAYOUTS.values()
            for _ in range(4)
        ]
        for x in params:
            x.grad = torch.randn(x.shape[::-1], generator=generator).permute(list(range(x.dim()))[::-1])
        optimizer = NNLAMB(params, lr=1e-2, state_dtype=torch.bfloat16, backend=backend)
        optimizer.step()
        return params, optimizer

    (params, ours), (twins, theirs) = trained(backend), trained("reference")
    assert largest_difference(params, twins) < 1e-6
    for x, y in zip(params, twins, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            differ = ours.state[x][key] != theirs.state[y][key]
            assert int(differ.sum()) <= 0.005 * x.numel(), "more than lie so close to a boundary"


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
def test_empty_tensors_take_part(name: str, norm: str, backend: str) -> None:
    empty, filled = torch.zeros(0, 3, requires_grad=True), torch.ones(4, requires_grad=True)
    for params in ([empty], [empty, filled], [filled, empty]):
        optimizer = build(name, params, backend=backend, norm=norm)
        run(optimizer, params, 2)
        assert all(ratio.isfinite() for ratio in optimizer.trust_ratios().values())
        loaded = build(name, params, backend=backend, norm=norm)
        loaded.load_state_dict(optimizer.state_dict())
        run(loaded, params, 1)
    assert not torch.equal(filled, torch.ones(4))


@pytest.mark.parametrize("make", [LAMB, lambda params: Layerwise(torch.optim.AdamW(params))], ids=["lamb", "layerwise"])
@pytest.mark.parametrize("grouped", [False, True])
def test_tied_parameters_are_one_layer(make: Callable[..., torch.optim.Optimizer], grouped: bool) -> None:
    def trained(tied: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.ModuleDict({"embedding": nn.Embedding(6, 4), "decoder": nn.Linear(4, 6, bias=False)})
        if tied:
            model["decoder"].weight = model["embedding"].weight
        optimizer = make(param_groups(model) if grouped else model.parameters())
        for step in range(2):
            generator = torch.Generator().manual_seed(step)
            for x in model.parameters():
                x.grad = torch.randn(x.shape, generator=generator)
            optimizer.step()
        return model, optimizer

    model, optimizer = trained(tied=True)
    assert model["decoder"].weight is model["embedding"].weight
    assert list(optimizer.trust_ratios()) == (["embedding.weight"] if grouped else [0])
    assert float(optimizer.state[model["embedding"].weight]["step"]) == 2
    _, apart = trained(tied=False)
    assert len(apart.trust_ratios()) == 2


@pytest.mark.parametrize("backend", FLOAT32_BACKENDS)
def test_names_travel_into_the_report(backend: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = LAMB(model.named_parameters(), backend=backend)
    params = list(model.parameters())
    params[1].requires_grad_(False)
    give_gradients([params[0], *params[2:]], 0)
    optimizer.step()
    assert list(optimizer.trust_ratios()) == ["0.weight", "1.weight", "1.bias"]


def test_parameters_that_share_memory_with_themselves_are_refused_by_torch() -> None:
    # As by every optimizer that writes in place: the same number cannot take several steps at once.
    x = torch.ones(1).expand(4).requires_grad_()
    x.grad = torch.ones(4)
    with pytest.raises(RuntimeError, match="single memory location"):
        LAMB([x]).step()


# ---- beyond 32 bits ----


def test_tiles_beyond_32_bits_keep_their_places() -> None:
    elements = 2**32 + 5
    huge = torch.empty(elements, device="meta", dtype=torch.bfloat16)
    tiles = [tile for (tile,) in foreach.tiles([huge], foreach.BUCKET)]
    starts = [tile.storage_offset() for tile in tiles]
    assert starts == list(range(0, elements, foreach.BUCKET))
    assert starts[-1] + tiles[-1].numel() == elements


@pytest.mark.parametrize(
    "origin", [precision.WHOLE, precision.Origin(start=7, run=10, skip=30)], ids=["whole", "shard"]
)
def test_the_noise_of_rounding_goes_on_beyond_32_bits(origin: precision.Origin) -> None:
    # Pieces that meet at 2^31 and at 2^32 round as one piece across the border does.
    seed, values = precision.seed_of(3.0, 0), torch.rand(1000)
    for border in (2**31, 2**32):
        across = precision.round_stochastically(values, seed, 0, border - 500, origin)
        pieces = [
            precision.round_stochastically(values[:500], seed, 0, border - 500, origin),
            precision.round_stochastically(values[500:], seed, 0, border, origin),
        ]
        assert torch.equal(across, torch.cat(pieces))
    # The noise repeats after 2^29 elements for the first state, after 2^32 for the second, and not before.
    for state, period in enumerate((2**29, 2**32)):
        first, half, whole = (
            precision.round_stochastically(values, seed, state, at) for at in (0, period // 2, period)
        )
        assert torch.equal(first, whole)
        assert not torch.equal(first, half)


@pytest.mark.parametrize("border", [2**31, 2**32])
@pytest.mark.parametrize("origin", [precision.Origin(start=2**31), precision.Origin(7, run=10, skip=30)], ids=str)
def test_a_shard_rounds_as_the_whole_layer_does_beyond_32_bits(origin: precision.Origin, border: int) -> None:
    seed, values = precision.seed_of(3.0, 0), torch.rand(64)
    together = precision.round_stochastically(values, seed, 0, border - 32, origin)
    for i, value in enumerate(values):
        local = border - 32 + i
        in_the_layer = origin.start + local + local // origin.run * origin.skip
        assert together[i] == precision.round_stochastically(value.view(1), seed, 0, in_the_layer)
