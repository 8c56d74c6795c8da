"""Run by test_sharded_optimizers.py: every optimizer under every sharding. Usage: optimizer_ranks.py FOLDER RANKS"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import Collectives, on_ranks
from skewed import EACH_KIND, OPTIMIZERS, STEPS, Layers, break_gradient, build, gradient
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from largebatch import LAMB
from largebatch.optim import flat_partition, norms

Params = dict[str, Any]


def place(model: nn.Module, mesh: DeviceMesh, placements: Callable[[Tensor], list[Any]]) -> nn.Module:
    """Distribute every parameter over the mesh."""
    for name, x in list(model.named_parameters()):
        setattr(model, name, nn.Parameter(distribute_tensor(x.data, mesh, placements(x))))
    return model


def fsdp(repeat: int = 1) -> nn.Module:
    return fully_shard(Layers(repeat), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def hsdp() -> nn.Module:
    shape = (2, dist.get_world_size() // 2)
    return fully_shard(Layers(), mesh=init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")))


def by_row() -> nn.Module:
    return place(Layers(), init_device_mesh("cpu", (dist.get_world_size(),)), lambda x: [Shard(0)])


def by_column() -> nn.Module:
    """The biases are held whole by every rank, as under tensor parallelism."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return place(Layers(), mesh, lambda x: [Shard(x.dim() - 1) if x.dim() > 1 else Replicate()])


def fsdp_by_column() -> nn.Module:
    """A mesh of two dimensions: rows over one, columns over the other; the biases over the first alone."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2))
    return place(Layers(), mesh, lambda x: [Shard(0), Shard(x.dim() - 1) if x.dim() > 1 else Replicate()])


def fsdp_by_row() -> nn.Module:
    """As FSDP2 does it after tensor parallelism by rows: both dimensions of the mesh cut the same one of the tensor."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))
    model = place(Layers(), mesh["tensor"], lambda x: [Shard(0)])
    return fully_shard(model, mesh=mesh["data"])


SHARDINGS: dict[str, Callable[[], nn.Module]] = {
    function.__name__: function for function in (fsdp, hsdp, by_row, by_column, fsdp_by_column, fsdp_by_row)
}


def give_gradients(model: nn.Module, step: int, broken: bool = False) -> None:
    """Give each rank its shard of each gradient."""
    for name, x in model.named_parameters():
        value = gradient(name, x.shape, step)
        value = break_gradient(name, value, step) if broken else value
        whole = DTensor.from_local(value, x.device_mesh, [Replicate()] * x.device_mesh.ndim)
        x.grad = whole.redistribute(placements=x.placements)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = STEPS, broken: bool = False
) -> dict[str, Any]:
    params = dict(model.named_parameters())
    held = []
    for step in range(steps):
        give_gradients(model, step, broken)
        optimizer.step()
        ratios = zip(params, optimizer.trust_ratios().values(), strict=True)
        held += [(step, name) for name, ratio in ratios if ratio.isnan()]
    return {
        "params": {name: x.detach().full_tensor() for name, x in params.items()},
        "state": {name: whole_state(optimizer.state[x]) for name, x in params.items()},
        "ratios": dict(zip(params, optimizer.trust_ratios().values(), strict=True)),
        "held": held,
    }


def whole_state(state: dict[str, Any]) -> dict[str, Tensor]:
    return {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in state.items()}


def one_step_of(model: nn.Module, name: str) -> dict[str, int]:
    """Count the collectives of an optimizer's second step, by name."""
    optimizer = build(name, list(model.parameters()))
    train(model, optimizer, steps=1)
    give_gradients(model, 1)
    with Collectives() as counted:
        optimizer.step()
    return dict(counted.counts)


def naive(model: nn.Module) -> dict[str, Any]:
    """What all other packages do under FSDP1: the norm of the shard for the norm of the layer."""
    right = norms.combine
    norms.combine = lambda local, cuts, norm: right(local, [() for _ in cuts], norm)
    try:
        return train(model, build("lamb", list(model.parameters())))
    finally:
        norms.combine = right


def flat(name: str) -> dict[str, Any]:
    """ZeRO's way: all layers end to end, each rank a stretch of that, with padding behind."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = Layers()
    sizes = {key: x.numel() for key, x in model.named_parameters()}
    length = -(-sum(sizes.values()) // world) + 1

    def stretch(tensors: Iterator[Tensor]) -> Tensor:
        end_to_end = torch.cat([a.detach().reshape(-1) for a in tensors])
        padded = torch.cat([end_to_end, torch.full((length * world - len(end_to_end),), 3.0)])
        return padded[rank * length : (rank + 1) * length].clone()

    held = nn.Parameter(stretch(model.parameters()))
    optimizer = build(name, [flat_partition(held, sizes, start=rank * length)])
    for step in range(STEPS):
        held.grad = stretch(gradient(key, x.shape, step) for key, x in model.named_parameters())
        optimizer.step()
    gathered = {}
    for key, tensor in {"params": held.detach(), **optimizer.state[held]}.items():
        if tensor.shape == held.shape:
            everything = [torch.empty_like(tensor) for _ in range(world)]
            dist.all_gather(everything, tensor)
            pieces = torch.cat(everything).split([*sizes.values(), length * world - sum(sizes.values())])
            gathered[key] = dict(zip(sizes, pieces, strict=False))
            padding = pieces[-1]
            assert key != "params" or bool((padding == 3).all())
    shapes = {key: x.shape for key, x in model.named_parameters()}
    return {
        "params": {key: x.view(shapes[key]) for key, x in gathered.pop("params").items()},
        "state": {key: {k: v[key].view(shape) for k, v in gathered.items()} for key, shape in shapes.items()},
        "ratios": optimizer.trust_ratios(),
    }


def zero_redundancy(name: str) -> dict[str, Any]:
    made, settings = OPTIMIZERS[name]
    model = Layers()
    names, params = zip(*model.named_parameters(), strict=True)
    # As `param_groups` makes them: ZeRO leaves each rank some of the parameters, and the names of all.
    optimizer = ZeroRedundancyOptimizer([{"params": list(params), "param_names": list(names)}], made, **settings)
    for step in range(STEPS):
        for key, x in model.named_parameters():
            x.grad = gradient(key, x.shape, step)
        optimizer.step()
    return {"params": {key: x.detach() for key, x in model.named_parameters()}}


def partial_gradients() -> dict[str, Any]:
    """Gradients of replicated parameters that are still to be summed, as tensor parallelism leaves them."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = place(Layers(), mesh, lambda x: [Replicate()])
    optimizer = build("lamb", list(model.parameters()))
    share = torch.tensor([0.1, 0.2, 0.3, 0.4])[dist.get_rank()]
    for step in range(STEPS):
        for name, x in model.named_parameters():
            x.grad = DTensor.from_local(share * gradient(name, x.shape, step), mesh, [Partial()])
        with Collectives() as counted:
            optimizer.step()
    assert all(x.grad.placements == (Partial(),) for x in model.parameters())
    return {
        "params": {name: x.detach().full_tensor() for name, x in model.named_parameters()},
        "collectives": dict(counted.counts),
    }


def refused(build_and_step: Callable[[], None]) -> str:
    try:
        build_and_step()
    except ValueError as error:
        return str(error)
    return ""


def fsdp1(use_orig_params: bool, wrapped_first: bool) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model: nn.Module = nn.Linear(8, 6)
    optimizer = None if wrapped_first else LAMB(model.parameters())
    wrapped = FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    if optimizer is None:
        optimizer = LAMB(wrapped.parameters())
    wrapped(torch.ones(2, 8)).sum().backward()
    optimizer.step()


def partial_weights() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    LAMB([nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]))])


def on_eight(rank: int) -> dict[str, Any]:
    """18 rows on 8 ranks: three each, and none for the last two."""
    model = by_row()
    assert len(model.embedding.to_local()) == (3 if rank < 6 else 0)
    results = {}
    for name in EACH_KIND:
        model = by_row()
        results[f"by_row/{name}"] = train(model, build(name, list(model.parameters())))
    return results


def on_few(rank: int) -> dict[str, Any]:
    many = dist.get_world_size() == 4
    some = ("lamb", "lamb-bf16-state", "layerwise") if many else ("lamb",)
    results: dict[str, Any] = {}
    for sharding, make in SHARDINGS.items():
        for name in (OPTIMIZERS if many else EACH_KIND) if sharding == "fsdp" else some:
            model = make()
            results[f"{sharding}/{name}"] = train(model, build(name, list(model.parameters())))
    for name in (*some, "lamb-linf", "lars2017") if many else some:
        results[f"flat/{name}"] = flat(name)
        if name not in ("lamb-bf16-state", "layerwise"):
            results[f"zero_redundancy/{name}"] = zero_redundancy(name)
    if many:
        for name in ("lamb", "lamb-linf", "lamb-reference"):
            model = fsdp()
            results[f"broken/{name}"] = train(model, build(name, list(model.parameters())), broken=True)
        results["naive"] = naive(fsdp())
        results["partial_gradients"] = partial_gradients()
        results["collectives"] = {
            **{f"fsdp/{name}": one_step_of(fsdp(), name) for name in OPTIMIZERS},
            "fsdp, 10 times the layers": one_step_of(fsdp(repeat=10), "lamb"),
            **{name: one_step_of(make(), "lamb") for name, make in SHARDINGS.items()},
        }
        results["refused"] = {
            "flat parameter": refused(lambda: fsdp1(False, True)),
            "original parameters": refused(lambda: fsdp1(True, True)),
            "optimizer made before": refused(lambda: fsdp1(True, False)),
            "partial weights": refused(partial_weights),
        }
    return results


if __name__ == "__main__":
    folder, num_ranks = Path(sys.argv[1]), int(sys.argv[2])
    on_ranks(num_ranks, on_eight if num_ranks == 8 else on_few, folder, timeout_s=150)
