"""States narrower than the mathematics: which dtype a state has, and rounding that does not lose small steps.

An exponential average moves by less than one unit in the last place of bfloat16 (8 bits) at most steps: β₂ = 0.999
moves v by 0.1% at a time, and rounding to nearest would freeze it. Stochastic rounding goes up or down with the
probability that keeps the expected value exact. Its noise is a hash of the step, the layer and the element, not a draw
from torch's generator, so that every backend rounds alike, a resumed run rounds as if it had never stopped, and
dropout is not disturbed.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

STATE_DTYPES = (None, torch.float32, torch.bfloat16)


class Origin(NamedTuple):
    """Where the elements a process holds lie in their layer, both in order: i at start + i + (i // run) · skip."""

    start: int = 0
    run: int = 1
    skip: int = 0


WHOLE = Origin()


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a layer's mathematics is done: float32, or x's own where that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def state_dtype(x: Tensor, asked: torch.dtype | None) -> torch.dtype:
    """Return the dtype of a layer's moments: the one asked for, else that of the mathematics."""
    return asked or compute_dtype(x)


def mix(h: Tensor) -> Tensor:
    """Scramble int32 values in place: every input bit reaches every output bit (C. Wellons' `lowbias32` constants)."""
    h ^= (h >> 16) & 0xFFFF
    h *= 0x7FEB352D
    h ^= (h >> 15) & 0x1FFFF
    h *= 0x846CA68B - (1 << 32)
    h ^= (h >> 16) & 0xFFFF
    return h


def seed_of(t: float | Tensor, position: int) -> Tensor:
    """Return the 0-D int32 seed for the states of one layer (``position``) at one step (``t``)."""
    step = t.detach().clone() if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64, device="cpu")
    return mix(mix(step.to(torch.int32)) + position)


def noise(index: Tensor, seed: Tensor, state: int) -> Tensor:
    """Return 16 bits of noise for each element (``index``, int32), for the first or the second ``state`` of a layer.

    A Weyl sequence from the seed, then one round of shift and multiplication, of which one state takes the lower half
    and the other the upper. That is a third of the work of `mix`, on which the speed of a step depends, and elements
    up to 65,536 apart are as independent of one another (dev/LOG.md). It repeats after 2^29 and 2^32 elements.
    """
    h = index * (0x9E3779B1 - (1 << 32)) + seed
    h ^= (h >> 13) & 0x7FFFF
    h *= 0x846CA68B - (1 << 32)
    return (h >> 16 if state else h) & 0xFFFF


def round_stochastically(value: Tensor, seed: Tensor, state: int = 0, first: int = 0, origin: Origin = WHOLE) -> Tensor:
    """Return float32 ``value`` with the lower half of its bits rounded off, up or down by chance.

    Args:
        value: float32; it becomes exactly representable in bfloat16.
        seed: 0-D int32.
        state: whether this is the first (0) or the second (1) state of its layer, whose noises are independent.
        first: the position of the first element in what this process holds of the layer.
        origin: where in the layer that lies. The noise depends on the position in the whole layer. Positions are those
            in memory, whatever the order of the dimensions.
    """
    start = (origin.start + first + (1 << 31)) % (1 << 32) - (1 << 31)
    index = torch.empty_like(value, dtype=torch.int32)
    index.as_strided((value.numel(),), (1,)).copy_(torch.arange(value.numel(), dtype=torch.int32, device=value.device))
    if origin.skip:
        rows = torch.div(index.long() + first, origin.run, rounding_mode="floor")  # `first` may be beyond 32 bits
        index += (rows * origin.skip).to(torch.int32)  # which wraps around, as all of the noise does
    bits = value.view(torch.int32) + noise(index + start, seed, state)
    rounded = (bits & -0x10000).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value)


def store(target: Tensor, value: Tensor, layer: Any, state: int, first: int = 0) -> None:
    """Write ``value`` into one of the states of a `backends.Layer`, stochastically rounded if that is bfloat16."""
    if target.dtype is torch.bfloat16:
        seed = seed_of(layer.hyper.t, layer.position)
        value = round_stochastically(value.float(), seed, state, first, layer.origin)
    target.copy_(value)


def store_weights(targets: list[Tensor], values: list[Tensor]) -> None:
    """Write values into weights of one dtype; what float16 cannot hold becomes its largest number, not inf."""
    if targets[0].dtype is torch.float16:
        largest = torch.finfo(torch.float16).max
        values = list(torch._foreach_clamp_max(torch._foreach_clamp_min(values, -largest), largest))
    torch._foreach_copy_(targets, values)
