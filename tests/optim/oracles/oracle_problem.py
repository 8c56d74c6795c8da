"""The problem on which other packages' optimizers and ours take the same steps, and what "the same" means."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from largebatch.bench.peers import module_of

Arrays = list[np.ndarray]

STEPS = 20
LR = 1e-2

# A layer's largest difference over its largest element. A float32 step rounds x once, by up to 2⁻²⁴ = 6e-8 of it, and
# the step's own error is some ten roundings of the share LR of x: 20 steps stay under 20 · 6e-8 = 1.2e-6 on either
# side. In float64 the same count gives 2e-15 · 20; what remains is the conditioning of m/√v, one or two digits.
SAME = {np.dtype(np.float32): 2.4e-6, np.dtype(np.float64): 1e-12}
# What tells two dialects apart is at least this. (The step itself is 20 · LR of a layer.)
DIFFERENT = 1e-3

DTYPES = [np.float32, np.float64]


def start(dtype: Any) -> Arrays:
    """Layers of very different norms: above and below ten, a single element, zeros, and one of a ratio above ten."""
    draw = np.random.default_rng(0).standard_normal
    layers = [draw((24, 17)), 0.02 * draw((6, 5)), 0.3 * draw(7), np.array([1.5]), np.zeros(5), 200 * draw((4, 3))]
    return [layer.astype(dtype) for layer in layers]


def gradients(layers: Arrays, step: int) -> Arrays:
    """The gradient at these layers of an uneven bowl, with noise that depends on the step: same in, same out."""
    draw = np.random.default_rng(1000 + step).standard_normal
    made = []
    for i, x in enumerate(layers):
        steepness = np.linspace(0.5, 2.0, x.size).reshape(x.shape)
        g = 10.0 ** (i - 2) * (steepness * (x.astype(np.float64) - 0.1) + 0.5 * draw(x.shape))
        made.append(g.astype(x.dtype))
    return made


def by_torch(
    build: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], dtype: Any, clip: float | None = None
) -> Arrays:
    """Where a torch optimizer, ours or another's, takes the layers."""
    params = [torch.nn.Parameter(torch.from_numpy(x)) for x in start(dtype)]
    optimizer = build(params)
    walk(optimizer, params, 0, STEPS, clip)
    return values(params)


def walk(
    optimizer: torch.optim.Optimizer,
    params: list[torch.nn.Parameter],
    first: int,
    stop: int,
    clip: float | None = None,
) -> None:
    """Take the steps ``first`` to ``stop - 1``, the gradients clipped by their global norm if ``clip`` says so."""
    for step in range(first, stop):
        for x, g in zip(params, gradients(values(params), step), strict=True):
            x.grad = torch.from_numpy(g)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()


def values(params: list[torch.nn.Parameter]) -> Arrays:
    return [x.detach().numpy().copy() for x in params]


def difference(ours: Arrays, theirs: Arrays) -> float:
    """The largest difference of two lists of layers, each relative to the layer's largest element."""
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(ours, theirs, strict=True))


def assert_same(ours: Arrays, theirs: Arrays, tolerance: float = 0.0) -> None:
    assert difference(ours, theirs) < max(SAME[theirs[0].dtype], tolerance)


def peer(name: str) -> Any:
    """Import a module of another package, if need be without its parents, which want what nothing here needs."""
    try:
        return module_of(name)
    except ImportError as error:
        pytest.skip(f"not installed: {error}", allow_module_level=True)
