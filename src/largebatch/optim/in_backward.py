"""The optimizer in the backward pass: each layer moves as soon as its gradient is complete, which is then freed."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import norms
from .offload import CPUOffload
from .twins import Twin, members_of


class InBackward:
    """What `optimizer_in_backward` returns; `remove` gives the optimizer its step back."""

    def __init__(self, optimizer: Optimizer, with_grad_norm: bool) -> None:
        self._with_grad_norm = with_grad_norm
        self._squares: dict[Tensor, Tensor] = {}  # of the gradients of this step
        self._moved: set[Tensor] = set()  # since the last `optimizer.step()`
        members = [member for member in members_of(optimizer) if member.x.requires_grad]
        self._twins = {member.x: Twin(optimizer, [member]) for member in members}
        self._hooks: list[Any] = []
        for x in self._twins:
            self._hooks.append(x.register_post_accumulate_grad_hook(self._move))  # type: ignore[no-untyped-call]
        self._hooks.append(optimizer.register_step_post_hook(self._end))

    @torch.no_grad()
    def _move(self, x: Tensor) -> None:
        """Move one layer and free its gradient."""
        twin = self._twins[x]
        if x in self._moved:
            raise ValueError(
                f"a gradient of shape {list(x.shape)} came twice in one step, and the first has moved its layer: with "
                "optimizer_in_backward call optimizer.step() after every backward pass, do not accumulate gradients, "
                "and checkpoint activations with use_reentrant=False"
            )
        if norms.is_sharded(x):  # whatever is still to be summed
            (x.grad,) = norms.gradients([x])
        if self._with_grad_norm:
            self._squares[x] = norms.square(x)
        twin.step()
        x.grad = None
        self._moved.add(x)

    def _end(self, optimizer: Any, *_: Any) -> None:
        """Report the layers that have moved since the step before; the optimizer itself has moved the rest."""
        if hasattr(optimizer, "_ratios"):
            moved = [twin.optimizer for x, twin in self._twins.items() if x in self._moved]
            optimizer._ratios[0] = [reported for each in (*moved, optimizer) for reported in each._ratios[0]]
        self._moved.clear()

    def grad_norm(self) -> Tensor:
        """Return the l2 norm over all gradients since this was last asked, a 0-D tensor.

        One all-reduce for each process group over which any of them is cut. All processes must ask.

        Raises:
            ValueError: the norm was not asked for, or there was no gradient.
        """
        if not self._squares:
            asked = "there was no backward pass" if self._with_grad_norm else "with_grad_norm=True was not given"
            raise ValueError(f"grad_norm: {asked}")
        squares, self._squares = self._squares, {}
        return norms.norm_from_squares(torch.cat(list(squares.values())), list(squares))

    def remove(self) -> None:
        """Detach from the parameters: from now on `optimizer.step()` moves them all again."""
        for hook in self._hooks:
            hook.remove()


def optimizer_in_backward(optimizer: Optimizer, *, with_grad_norm: bool = False) -> InBackward:
    """Let every backward pass move each layer as soon as its gradient is complete, and free the gradient.

    The full set of gradients, 4 bytes a parameter in float32, is never there; weights, state, state dict and trust
    ratios are those of the ordinary step, to the bit. Keep the loop as it is: learning rates are set before the
    backward pass, and ``optimizer.step()`` after it ends the step, moving whatever has a gradient still.

    Use it where memory decides the batch. It costs a call of the optimizer for each parameter, and for a parameter that
    is cut over processes (FSDP2) an all-reduce each, in place of one for all. What needs all gradients before the first
    layer moves cannot go with it: accumulation over micro-batches (refused when it happens), clipping by the global
    norm, `torch.amp.GradScaler` (which finds no gradient, and says so), and DistributedDataParallel, whose sums come
    later and whose buckets hold all gradients anyway. A tied parameter moves once, when all its uses are summed.

    Args:
        optimizer: `LAMB`, `LARS`, `Layerwise` or their kin, or one of torch's that moves every layer by itself. Groups
            that are added later, parameters that are frozen now, and such as are assigned their gradients move in
            ``optimizer.step()``.
        with_grad_norm: measure every gradient before it goes, for `InBackward.grad_norm`.

    Returns:
        A handle with ``grad_norm()`` and ``remove()``.

    Raises:
        ValueError: an optimizer that needs all gradients at once, one that is offloaded, parameters of which other
            processes hold replicas, or flat partitions of several processes.

    Example:
        >>> from largebatch import LAMB, param_groups
        >>> from largebatch.optim import optimizer_in_backward
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = LAMB(param_groups(model), lr=1e-2)
        >>> handle = optimizer_in_backward(optimizer)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> model.weight.grad is None  # moved, and freed
        True
        >>> optimizer.step()
        >>> sorted(optimizer.trust_ratios())
        ['bias', 'weight']
    """
    if isinstance(optimizer, CPUOffload):
        raise ValueError("optimizer: a CPUOffload moves all layers at once, and cannot go into the backward pass")
    for member in members_of(optimizer):
        if norms.has_replicas(member.x) and hasattr(member.x, "_flat_partition"):
            raise ValueError(
                "a flat partition of several processes is given its gradient after the backward pass: call "
                "optimizer.step() without optimizer_in_backward, or shard the model with fully_shard (FSDP2)"
            )
        if norms.has_replicas(member.x):
            raise ValueError(
                "several processes hold the same parameters, whose gradients are to be summed before a layer moves; "
                "DistributedDataParallel does so after the backward pass. Shard the model with fully_shard (FSDP2)"
            )
    return InBackward(optimizer, with_grad_norm)
