"""N-LAMB and NN-LAMB against Nadam, from which docs/mathematics.md derives them, computed by `torch.optim.NAdam`.

Guards the formulas that no published source was at hand for. NAdam lets its momentum coefficient grow from β₁/2 to β₁;
``momentum_decay=1e6`` makes it β₁ at once. float64 throughout, twenty steps of some ten roundings each: 1e-12.
"""

from collections.abc import Iterator

import pytest
import torch
from optim_cases import BACKENDS
from torch import Tensor

from largebatch import LAMB, NLAMB, NNLAMB

BETAS, EPS, LR, STEPS = (0.8, 0.9), 1e-3, 1e-2, 20
PLAIN = {"betas": BETAS, "weight_decay": 0.0, "adapt": False}


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    """NAdam keeps the product of its coefficients in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def gradients() -> Tensor:
    return torch.randn(STEPS, 7, generator=torch.Generator().manual_seed(3)) + 0.3


def path(make, of: Tensor, start: float = 1.0) -> Tensor:
    """Return the weights before the first step and after each one."""
    x = torch.full((7,), start, requires_grad=True)
    optimizer, seen = make([x]), [x.detach().clone()]
    for g in of:
        x.grad = g.clone()
        optimizer.step()
        seen.append(x.detach().clone())
    return torch.stack(seen)


def looked_ahead(of: Tensor, beta: float) -> Tensor:
    """β a/(1 − βᵗ⁺¹) + (1 − β) g/(1 − βᵗ), by NAdam, which at β₂ = ε = 0 divides it by |g|."""
    seen = path(lambda p: torch.optim.NAdam(p, 1.0, (beta, 0.0), 0.0, momentum_decay=1e6), of, start=0.0)
    return -seen.diff(dim=0) * of.abs()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nlamb_without_its_ratio_is_nadam(backend: str) -> None:
    g, root = gradients(), BETAS[1] ** 0.5  # v̂ has a factor β₂ that NAdam has not
    nadam = path(lambda p: torch.optim.NAdam(p, LR, BETAS, EPS, momentum_decay=1e6), g)
    nlamb = path(lambda p: NLAMB(p, lr=LR * root, eps=EPS * root, backend=backend, **PLAIN), g)
    assert torch.allclose(nlamb, nadam, rtol=1e-12, atol=0)
    for other in (NLAMB, NNLAMB, LAMB):  # NLAMB, with the factor left in place
        assert not torch.allclose(path(lambda p, c=other: c(p, lr=LR, eps=EPS, **PLAIN), g), nadam, rtol=1e-4, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nnlamb_looks_ahead_on_both_moments(backend: str) -> None:
    g = gradients()
    r = looked_ahead(g, BETAS[0]) / (looked_ahead(g.square(), BETAS[1]).sqrt() + EPS)
    # Steps are differences of weights near 1, which costs two digits.
    seen = path(lambda p: NNLAMB(p, lr=LR, eps=EPS, backend=backend, **PLAIN), g)
    assert torch.allclose(seen.diff(dim=0), -LR * r, rtol=1e-11, atol=0)
    nlamb = path(lambda p: NLAMB(p, lr=LR, eps=EPS, backend=backend, **PLAIN), g)
    assert not torch.allclose(nlamb.diff(dim=0), -LR * r, rtol=1e-3, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("made", [NLAMB, NNLAMB])
def test_the_first_step_is_lambs(made, backend: str) -> None:
    # m̂ is a multiple of g there and v̂ of g², and the ratio forgets the factor; decay makes it matter.
    g = gradients()[:1]
    for weight_decay, equal in ((0.0, True), (0.5, False)):
        settings = {"lr": 0.1, "betas": BETAS, "eps": 0.0, "weight_decay": weight_decay, "backend": backend}
        ours, lamb = (path(lambda p, c=c, s=settings: c(p, **s), g, start=0.7) for c in (made, LAMB))
        assert torch.allclose(ours, lamb, rtol=1e-13, atol=0) is equal
