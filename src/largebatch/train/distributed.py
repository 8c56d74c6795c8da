"""The ranks of a run: who am I, sums over everybody, and who holds what of the model.

One process is the degenerate case, with no communication. With `optim/norms.py` the only code that touches
`torch.distributed`; DDP, FSDP2 and its hybrid do the work.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from largebatch.errors import UserError

SHARDINGS = ("ddp", "fsdp", "hsdp")
COMPRESSIONS = ("none", "bf16")


def initialize(device: str, timeout_s: float = 600) -> torch.device:
    """Join the process group that `torchrun` describes in the environment, if any, and return this rank's device.

    Args:
        device: "cpu", "cuda" or "auto" (CUDA where there is one).
        timeout_s: a rank that waits longer than this for another one ends with an error.

    Raises:
        UserError: CUDA was asked for and there is none.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device is {device!r}; it must be auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but torch finds no CUDA device; use --device cpu")
    use_cuda = device != "cpu" and torch.cuda.is_available()
    chosen = torch.device("cpu")
    if use_cuda:
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(chosen)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if use_cuda else "gloo", timeout=timedelta(seconds=timeout_s))
    return chosen


def finalize() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's rank, 0 when it is alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_chief() -> bool:
    """Whether this process is the one that writes and prints; known before the process group is there."""
    return int(os.environ.get("RANK", "0")) == 0


def world_size() -> int:
    """The number of processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum `tensor` over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def largest(value: float, device: torch.device) -> float:
    """The largest `value` of any rank."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, device=device, dtype=torch.float64 if device.type == "cpu" else torch.float32)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return float(tensor.item())


def of_chief(value: bool) -> bool:
    """The chief's `value`, on every rank."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()


# ---- the model on many ranks ----


def shard(model: nn.Module, sharding: str, compression: str = "none") -> None:
    """Cut the model's parameters over the ranks, in place; call it before the optimizer is made.

    Every member of a `nn.ModuleList` (a transformer's layers) is gathered and freed as one, and so is the rest.

    Args:
        model: whole, the same on every rank.
        sharding: "ddp" leaves the model whole on every rank; "fsdp" cuts it over all ranks; "hsdp" over those of one
            machine, with a copy on each machine.
        compression: "bf16" sums the gradients in bfloat16, which halves the traffic.

    Raises:
        UserError: an unknown name.
    """
    if sharding not in SHARDINGS:
        raise UserError(f"sharding is {sharding!r}; it must be {', '.join(SHARDINGS)}")
    if compression not in COMPRESSIONS:
        raise UserError(f"gradient_compression is {compression!r}; it must be {', '.join(COMPRESSIONS)}")
    if sharding == "ddp" or world_size() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if sharding == "hsdp" else world_size()
    device_type = next(model.parameters()).device.type
    mesh = init_device_mesh(device_type, (world_size() // ranks, ranks), mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if compression == "bf16" else None)
    mesh = mesh if ranks < world_size() else mesh["shard"]
    for part in list(model.modules()):
        if isinstance(part, nn.ModuleList):
            for unit in part:
                fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def _sum_in_bf16(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """torch's own hook, which DDP would refuse by its name on a CPU, where gloo sums bfloat16 as well."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

    return bf16_compress_hook(state, bucket)


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
        self._is_sharded = any(hasattr(x, "placements") for x in model.parameters())
        if world_size() == 1:
            return
        if self._is_sharded:
            from torch.distributed.fsdp import FSDPModule

            for part in model.modules():
                if isinstance(part, FSDPModule):  # the engine's losses add up to the global mean: sum, do not average
                    part.set_gradient_divide_factor(1.0)
                    part.set_force_sum_reduction_for_comms(True)
        else:
            from torch.nn.parallel import DistributedDataParallel

            self.forward = DistributedDataParallel(model, gradient_as_bucket_view=True)
            self.loss_scale = world_size()  # which it divides by
            if compression == "bf16":
                self.forward.register_comm_hook(None, _sum_in_bf16)

    @contextmanager
    def backward(self, last: bool) -> Iterator[None]:
        """Run a micro-batch within this; only the ``last`` one of a global step communicates."""
        if self._is_sharded:
            self.forward.set_requires_gradient_sync(last)  # type: ignore[operator]
            self.forward.set_is_last_backward(last)  # type: ignore[operator]
            yield
        elif self.forward is not None and hasattr(self.forward, "no_sync") and not last:
            with self.forward.no_sync():  # type: ignore[operator]
                yield
        else:
            yield
