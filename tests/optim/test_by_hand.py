"""The first two steps of every rule against arithmetic done here on single numbers.

Guards the order of operations where implementations go wrong: a bias correction left out or folded into the rate,
decay outside of the ratio, momentum seeded with the unscaled first gradient. Everything is exact in float64; the
tolerance 1e-13 allows some hundred roundings.
"""

from math import hypot, sqrt

import pytest
import torch
from optim_cases import BACKENDS

from largebatch import LAMB, LARS, NLAMB, NNLAMB

X = (3.0, 4.0)  # ‖x‖ = 5
G1, G2 = (1.0, -2.0), (-4.0, 0.5)


def two_steps(made, backend: str, **settings) -> list[list[float]]:
    """Return x after each of two steps from X with gradients G1 and G2."""
    x = torch.tensor(X, dtype=torch.float64, requires_grad=True)
    optimizer = made([x], backend=backend, **settings)
    seen = []
    for g in (G1, G2):
        x.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
        seen.append(x.tolist())
    return seen


def move(x, u, rate, ratio=None):
    ratio = hypot(*x) / hypot(*u) if ratio is None else ratio
    return tuple(a - rate * ratio * b for a, b in zip(x, u, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_lamb(backend: str) -> None:
    # Step 1: m̂ = g and v̂ = g², so with ε = 0 the direction is sign(g) + λx.
    u1 = (1 + 0.1 * 3, -1 + 0.1 * 4)
    x1 = move(X, u1, 0.01)
    # Step 2: β₁ = 0.5 gives m̂ = (g₁ + 2 g₂)/3; β₂ = 0.75 gives v̂ = (3 g₁² + 4 g₂²)/7.
    r2 = [((a + 2 * b) / 3) / sqrt((3 * a * a + 4 * b * b) / 7) for a, b in zip(G1, G2, strict=True)]
    x2 = move(x1, tuple(r + 0.1 * x for r, x in zip(r2, x1, strict=True)), 0.01)
    seen = two_steps(LAMB, backend, lr=0.01, betas=(0.5, 0.75), eps=0.0, weight_decay=0.1)
    assert seen[0] == pytest.approx(x1, rel=1e-13)
    assert seen[1] == pytest.approx(x2, rel=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lamb_without_bias_correction(backend: str) -> None:
    # Step 1: m = g/2, v = g²/4: the direction is again sign(g) + λx. Step 2: m = (g₁ + 2 g₂)/4, v = (3g₁² + 4g₂²)/16.
    x1 = move(X, (1.3, -0.6), 0.01)
    r2 = [((a + 2 * b) / 4) / sqrt((3 * a * a + 4 * b * b) / 16) for a, b in zip(G1, G2, strict=True)]
    x2 = move(x1, tuple(r + 0.1 * x for r, x in zip(r2, x1, strict=True)), 0.01)
    seen = two_steps(LAMB, backend, lr=0.01, betas=(0.5, 0.75), eps=0.0, weight_decay=0.1, bias_correction=False)
    assert seen[0] == pytest.approx(x1, rel=1e-13)
    assert seen[1] == pytest.approx(x2, rel=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_epsilon_stands_outside_the_root_and_after_the_correction(backend: str) -> None:
    # r = 1/(1 + 3) and -2/(2 + 3); inside the root it would be 1/√(1 + 3), before the correction something else.
    x1 = move(X, (0.25, -0.4), 0.01)
    assert two_steps(LAMB, backend, lr=0.01, eps=3.0, weight_decay=0.0)[0] == pytest.approx(x1, rel=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("made", [NLAMB, NNLAMB])
def test_nesterov_lamb(made, backend: str) -> None:
    # β₁ = 0.5: m̂₁ = ½(½g)/(1 − ¼) + ½g/(1 − ½) = (1/3 + 1) g = 4/3 g.
    # NLAMB, β₂ = 0.75: v̂₁ = ¾(¼g²)/(1 − ¾) = ¾ g².  NNLAMB: v̂₁ = ¾(¼g²)/(1 − 9/16) + ¼g²/(1 − ¾) = (3/7 + 1) g².
    v1 = 3 / 4 if made is NLAMB else 10 / 7
    r1 = (4 / 3) / sqrt(v1)
    x1 = move(X, (r1 + 0.3, -r1 + 0.4), 0.01)
    # Step 2: m = (g₁ + 2g₂)/4, v = (3g₁² + 4g₂²)/16.
    r2 = []
    for a, b in zip(G1, G2, strict=True):
        m_hat = 0.5 * ((a + 2 * b) / 4) / (1 - 0.5**3) + 0.5 * b / (1 - 0.5**2)
        v = (3 * a * a + 4 * b * b) / 16
        v_hat = 0.75 * v / (1 - 0.75**2) if made is NLAMB else 0.75 * v / (1 - 0.75**3) + 0.25 * b * b / (1 - 0.75**2)
        r2.append(m_hat / sqrt(v_hat))
    x2 = move(x1, tuple(r + 0.1 * x for r, x in zip(r2, x1, strict=True)), 0.01)
    seen = two_steps(made, backend, lr=0.01, betas=(0.5, 0.75), eps=0.0, weight_decay=0.1)
    assert seen[0] == pytest.approx(x1, rel=1e-13)
    assert seen[1] == pytest.approx(x2, rel=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nesterov", [False, True])
def test_lars_normalises_the_momentum(nesterov: bool, backend: str) -> None:
    d1 = [g + 0.1 * x for g, x in zip(G1, X, strict=True)]
    m1 = [0.25 * d for d in d1]
    u1 = [0.75 * m + 0.25 * d for m, d in zip(m1, d1, strict=True)] if nesterov else m1
    x1 = move(X, u1, 0.01, 2 * hypot(*X) / (hypot(*u1) + 0.5))
    d2 = [g + 0.1 * x for g, x in zip(G2, x1, strict=True)]
    m2 = [0.75 * m + 0.25 * d for m, d in zip(m1, d2, strict=True)]
    u2 = [0.75 * m + 0.25 * d for m, d in zip(m2, d2, strict=True)] if nesterov else m2
    x2 = move(x1, u2, 0.01, 2 * hypot(*x1) / (hypot(*u2) + 0.5))
    seen = two_steps(
        LARS, backend, lr=0.01, momentum=0.75, weight_decay=0.1, trust_coefficient=2.0, eps=0.5, nesterov=nesterov
    )
    assert seen[0] == pytest.approx(x1, rel=1e-13)
    assert seen[1] == pytest.approx(x2, rel=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nesterov", [False, True])
def test_lars_of_2017_scales_what_enters_the_momentum(nesterov: bool, backend: str) -> None:
    r1 = 2 * hypot(*X) / (hypot(*G1) + 0.1 * hypot(*X) + 0.5)
    d1 = [r1 * (g + 0.1 * x) for g, x in zip(G1, X, strict=True)]
    b1 = d1  # scaled: the first entry of the buffer is r·d, not d
    s1 = [d + 0.75 * b for d, b in zip(d1, b1, strict=True)] if nesterov else b1
    x1 = move(X, s1, 0.01, 1.0)
    r2 = 2 * hypot(*x1) / (hypot(*G2) + 0.1 * hypot(*x1) + 0.5)
    d2 = [r2 * (g + 0.1 * x) for g, x in zip(G2, x1, strict=True)]
    b2 = [0.75 * b + d for b, d in zip(b1, d2, strict=True)]
    s2 = [d + 0.75 * b for d, b in zip(d2, b2, strict=True)] if nesterov else b2
    x2 = move(x1, s2, 0.01, 1.0)
    settings = {"momentum": 0.75, "weight_decay": 0.1, "trust_coefficient": 2.0, "eps": 0.5, "nesterov": nesterov}
    seen = two_steps(LARS, backend, lr=0.01, form="2017", **settings)
    assert seen[0] == pytest.approx(x1, rel=1e-13)
    assert seen[1] == pytest.approx(x2, rel=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("norm", "ratio"), [("l1", 7 / 1.9), ("l2", 5 / hypot(1.3, 0.6)), ("linf", 4 / 1.3)])
def test_the_ratio_in_each_norm(norm: str, ratio: float, backend: str) -> None:
    x = torch.tensor(X, dtype=torch.float64, requires_grad=True)
    optimizer = LAMB([("x", x)], lr=0.01, eps=0.0, weight_decay=0.1, norm=norm, backend=backend)
    x.grad = torch.tensor(G1, dtype=torch.float64)
    optimizer.step()
    assert x.tolist() == pytest.approx(move(X, (1.3, -0.6), 0.01, ratio), rel=1e-13)
    assert float(optimizer.trust_ratios()["x"]) == pytest.approx(ratio, rel=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("phi", "factor"), [(None, 5.0), ((0.0, 2.0), 2.0), ((7.0, 9.0), 7.0), (lambda norms: norms**2, 25.0)]
)
def test_phi_sets_the_length_of_the_step(phi, factor: float, backend: str) -> None:
    seen = two_steps(LAMB, backend, lr=0.01, eps=0.0, weight_decay=0.1, phi=phi)
    step = [a - b for a, b in zip(X, seen[0], strict=True)]
    assert hypot(*step) == pytest.approx(0.01 * factor, rel=1e-12)
