"""The model on many ranks: whole on each, or cut over them; its gradients summed once a step."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from largebatch.errors import UserError

from .ranks import exported, largest, world_size

SHARDINGS = ("ddp", "fsdp", "hsdp")
COMPRESSIONS = ("none", "bf16")


def shard(model: nn.Module, sharding: str, compression: str = "none") -> None:
    """Cut the model's parameters over the ranks, in place; call it before the optimizer is made.

    Every member of a `nn.ModuleList` (a transformer's layers) is gathered and freed as one, and so is the rest.

    Args:
        model: whole, the same on every rank.
        sharding: "ddp" leaves the model whole on every rank; "fsdp" cuts it over all ranks; "hsdp" over those of one
            machine, with a copy on each machine.
        compression: "bf16" sums the gradients in bfloat16, which halves the traffic.

    Raises:
        UserError: an unknown name, or machines with unequal numbers of ranks under "hsdp".
    """
    if sharding not in SHARDINGS:
        raise UserError(f"sharding is {sharding!r}; it must be {', '.join(SHARDINGS)}")
    if compression not in COMPRESSIONS:
        raise UserError(f"gradient_compression is {compression!r}; it must be {', '.join(COMPRESSIONS)}")
    if sharding == "ddp" or world_size() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device = next(model.parameters()).device
    ranks = _ranks_of_a_machine(device) if sharding == "hsdp" else world_size()
    mesh = init_device_mesh(device.type, (world_size() // ranks, ranks), mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if compression == "bf16" else None)
    mesh = mesh if ranks < world_size() else mesh["shard"]
    for part in reversed(list(model.modules())):  # the inner ones first
        if isinstance(part, nn.ModuleList):
            for unit in part:
                fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def _ranks_of_a_machine(device: torch.device) -> int:
    here = exported("LOCAL_WORLD_SIZE", world_size())
    most, least = largest(here, device), -largest(-here, device)
    if most != least or world_size() % here:
        raise UserError(
            f"sharding=hsdp with {least:.0f} to {most:.0f} of {world_size()} ranks on a machine: every machine must "
            "have as many; start as many on each, or use sharding=fsdp"
        )
    return here


class Replicas:
    """A model whose gradients are summed over the ranks, once for each global step, beside its last backward pass.

    Args:
        model: as `shard` left it, on this rank's device.
        compression: as for `shard`.

    Attributes:
        forward: the model to call in its place.
        loss_scale: what to multiply the loss by before its backward pass.
    """

    def __init__(self, model: nn.Module, compression: str = "none") -> None:
        self.forward = model
        self.loss_scale = 1
        self._ddp: Any = None
        self._fsdp: list[Any] = [part for part in model.modules() if hasattr(part, "set_requires_gradient_sync")]
        if world_size() == 1:
            return
        for part in self._fsdp:  # the engine's losses add up to the global mean: sum, do not average
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
        if not any(hasattr(x, "placements") for x in model.parameters()):
            from torch.nn.parallel import DistributedDataParallel

            self.forward = self._ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
            self.loss_scale = world_size()  # which it divides by
            if compression == "bf16":
                from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

                # DDP refuses the hook by its name on a CPU, where gloo sums bfloat16 as well.
                self._ddp.register_comm_hook(None, lambda state, bucket: bf16_compress_hook(state, bucket))

    def backward(self, last: bool) -> AbstractContextManager[None]:
        """Return what to run a micro-batch within; only the ``last`` one of a global step communicates."""
        for part in self._fsdp:
            part.set_requires_gradient_sync(last, recurse=False)
            part.set_is_last_backward(last)
        return nullcontext() if last or self._ddp is None else self._ddp.no_sync()
