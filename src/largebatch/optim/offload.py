"""Optimizer state on the CPU: gradients go there, the native kernel moves copies of the weights, and they come back."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import norms
from .checks import check, check_dense
from .twins import Member, Twin, alike, members_of
from .wrapper import Wrapper

# What travels at once, while the processor works on what came before.
CHUNK_ELEMENTS = 1 << 24


class CPUOffload(Wrapper):
    r"""An optimizer whose state, and whose arithmetic, are the CPU's.

    1. The gradients are copied to the CPU, chunk by chunk.
    2. As soon as a chunk is there, the optimizer moves a copy of its weights that the CPU keeps.
    3. The moved weights are copied back, beside the arithmetic on the next chunk.

    The device keeps weights and gradients. LAMB's state, 8 bytes a parameter, and the float32 masters of
    ``master_weights=True``, 4 more, live in host memory, which besides holds a copy of weights and gradients, pinned.
    A step waits for the copies (with bfloat16 weights and gradients 2 bytes a parameter each way) and for the CPU. Use
    it where the state does not fit on the device and a large batch makes steps rare; with parameters on the CPU it
    saves nothing and costs the copies.

    The groups are the wrapped optimizer's, and so is the state dict, which one that is not offloaded can load and the
    reverse. Weights that are loaded into the model after a step are noticed and taken over, unless through
    ``Tensor.data``.

    Args:
        base: the optimizer to wrap, freshly made: `LAMB`, `LARS`, `Layerwise` or their kin, or one of torch's that
            moves every layer by itself and runs on CPUs. Parameters may be DTensors (FSDP2, tensor parallelism).

    Raises:
        ValueError: not an optimizer, one that needs all gradients at once, or one with a backend for GPUs by name.

    Example:
        >>> from largebatch import LAMB, param_groups
        >>> from largebatch.optim import CPUOffload
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = CPUOffload(LAMB(param_groups(model), lr=1e-2))
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.trust_ratios())
        ['bias', 'weight']

    Source: ZeRO-Offload (Ren et al. 2021, arXiv 2101.06840).
    """

    def __init__(self, base: Optimizer) -> None:
        check("base", type(base).__name__, isinstance(base, Optimizer), "a torch.optim.Optimizer")
        self.base = base
        # In place of Optimizer.__init__, which would make groups and state of its own.
        self.__setstate__({"defaults": base.defaults})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient; return what ``closure``, if one is given to compute them, does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._follow_new_groups()
        params = [x for group in self.param_groups for x in group["params"] if x.grad is not None]
        check_dense(x.grad for x in params)
        grads = dict(zip(params, norms.gradients(params), strict=True))
        for chunk in self._chunks:
            chunk.fetch(grads)
        for chunk in self._chunks:
            chunk.move()
        return loss

    def trust_ratios(self) -> dict[str | int, Tensor]:
        """Return the trust ratio of every layer that the last step moved, on the CPU; see `LAMB.trust_ratios`."""
        twins = [chunk.twin.optimizer for chunk in self._chunks if chunk.has_moved]
        return norms.by_name(
            named for twin in twins if hasattr(twin, "trust_ratios") for named in twin.trust_ratios().items()
        )

    # ---- what is the wrapped optimizer's ----

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of the wrapped optimizer, offloaded or not."""
        state_dict = {**state_dict}  # as torch, so that hooks change none of the caller's
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        on_cpu = {member.x: member.moved for chunk in self._chunks for member in chunk.twin.members}
        groups = [{**group, "params": [on_cpu[x] for x in group["params"]]} for group in self.param_groups]
        loaded = alike(self.base, groups)
        loaded.load_state_dict(state_dict)
        for group, other in zip(self.param_groups, loaded.param_groups, strict=True):
            group.update({key: value for key, value in other.items() if key != "params"})
        self.state.clear()
        self.state.update({x: loaded.state[copy] for x, copy in on_cpu.items() if copy in loaded.state})
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"base": self.base, "defaults": self.defaults}

    def _follow_base(self) -> None:
        super()._follow_base()
        self._chunks = chunks_of(self.base)


class Chunk:
    """Some neighbouring parameters of one device, and the twin that moves them on the CPU."""

    def __init__(self, optimizer: Optimizer, members: list[Member]) -> None:
        self.twin = Twin(optimizer, members)
        self.device = norms.local(members[0].x).device
        self.has_moved = False
        self._module = torch.get_device_module(self.device)
        self._stream = self._module.Stream(self.device)  # of copies to the CPU; that of torch.cpu does nothing
        self._arrived: Any = None
        self._buffers: dict[Tensor, Tensor] = {}  # for the gradients
        self._copied = {member.x: version(member.x) for member in members}

    def fetch(self, grads: Mapping[Tensor, Tensor]) -> None:
        """Start the copies of the gradients to the CPU."""
        # The current stream computes the gradients, and took the weights back.
        self._stream.wait_stream(self._module.current_stream(self.device))
        with self._module.stream(self._stream):
            for member in self.twin.members:
                self._fetch(member.x, member.moved, grads.get(member.x))
        self._arrived = self._stream.record_event()

    def _fetch(self, x: Tensor, copy: Tensor, g: Tensor | None) -> None:
        if version(x) != self._copied[x]:  # weights were loaded into the model
            norms.local(copy).copy_(norms.local(x), non_blocking=True)
        if g is not None:
            if x not in self._buffers:
                self._buffers[x] = norms.on_cpu(x)
            norms.local(self._buffers[x]).copy_(norms.local(g), non_blocking=True)
        copy.grad = None if g is None else self._buffers[x]

    def move(self) -> None:
        """Wait for the gradients, move the copies, and start their way back."""
        if self._arrived is not None:
            self._arrived.synchronize()
        moving = [member for member in self.twin.members if member.moved.grad is not None]
        self.has_moved = bool(moving)
        if moving:
            self.twin.step()
        for member in moving:
            norms.local(member.x).copy_(norms.local(member.moved), non_blocking=True)
            self._copied[member.x] = version(member.x)


def version(x: Tensor) -> tuple[int, int, int]:
    """Return what changes whenever the weights do, those of a shard by themselves or through their DTensor."""
    held = norms.local(x)
    return held.data_ptr(), held._version, x._version


@torch.no_grad()
def chunks_of(optimizer: Optimizer) -> list[Chunk]:
    """Cut the parameters of an optimizer into what travels at once, each with a copy on the CPU."""
    chunks: list[list[Member]] = []
    size = 0
    for member in members_of(optimizer):
        held = norms.local(member.x)
        # Layers that are cut over processes stay together, so that all their norms are one all-reduce.
        is_full = size + held.numel() > CHUNK_ELEMENTS and not norms.is_sharded(member.x)
        if not chunks or is_full or norms.local(chunks[-1][0].x).device != held.device:
            chunks.append([])
            size = 0
        copy = norms.on_cpu(member.x)
        norms.local(copy).copy_(held)
        chunks[-1].append(member._replace(moved=copy))
        size += held.numel()
    return [Chunk(optimizer, members) for members in chunks]
