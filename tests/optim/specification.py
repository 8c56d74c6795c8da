"""LAMB, LARS, N-LAMB and NN-LAMB in NumPy float64, one tensor at a time, written from the paper alone.

The package's optimizers are held against this file. It was written without sight of them, so the two agree only
where both read the paper alike; keep it so, and settle a disagreement by the paper. Every function takes arrays and
returns new ones. Symbols as in the paper: x a layer's parameters, g its gradient, m and v the moments, t the number of
this step from 1, r the Adam direction, u the direction that is scaled, lambda the weight decay.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Phi = None | tuple[float, float] | Callable[[Array], Array]
Moments = tuple[Array, Array]


def length(x: Array, norm: str) -> float:
    """||x|| (section 2: L2 unless said otherwise; appendix F tries L1 and L-infinity)."""
    magnitudes = np.abs(x)
    if norm == "l1":
        return float(np.sum(magnitudes))
    if norm == "l2":
        return float(np.sqrt(np.sum(magnitudes**2)))
    assert norm == "linf"
    return float(np.max(magnitudes))


def phi_of(z: float, phi: Phi) -> float:
    """phi(z): the identity, min(max(z, gamma_l), gamma_u), or the user's (section 3)."""
    if phi is None:
        return z
    if isinstance(phi, tuple):
        gamma_l, gamma_u = phi
        return min(max(z, gamma_l), gamma_u)
    return float(phi(np.float64(z)))


def trust_ratio(x: Array, u: Array, phi: Phi, norm: str, adapt: bool) -> float:
    """phi(||x||) / ||u||; 1 if either norm is zero, or for a layer that is not adapted."""
    x_length = length(x, norm)
    u_length = length(u, norm)
    if not adapt or x_length == 0 or u_length == 0:
        return 1.0
    return phi_of(x_length, phi) / u_length


def lamb(
    x: Array, g: Array, moments: Moments, t: int, *, lr: float, betas: tuple[float, float], eps: float,
    weight_decay: float, bias_correction: bool, phi: Phi, norm: str, adapt: bool, maximize: bool,
) -> tuple[Array, Moments]:  # fmt: skip
    """Algorithm 2."""
    b1, b2 = betas
    if maximize:
        g = -g
    m = b1 * moments[0] + (1 - b1) * g
    v = b2 * moments[1] + (1 - b2) * g**2
    m_hat = m / (1 - b1**t) if bias_correction else m
    v_hat = v / (1 - b2**t) if bias_correction else v
    r = m_hat / (np.sqrt(v_hat) + eps)
    u = r + weight_decay * x
    x = x - lr * trust_ratio(x, u, phi, norm, adapt) * u
    return x, (m, v)


def nlamb(
    x: Array, g: Array, moments: Moments, t: int, *, lr: float, betas: tuple[float, float], eps: float,
    weight_decay: float, bias_correction: bool, phi: Phi, norm: str, adapt: bool, maximize: bool,
) -> tuple[Array, Moments]:  # fmt: skip
    """Algorithm 3 with constant coefficients: Nesterov's momentum, as in Nadam, on the first moment."""
    b1, b2 = betas
    if maximize:
        g = -g
    m = b1 * moments[0] + (1 - b1) * g
    v = b2 * moments[1] + (1 - b2) * g**2
    if bias_correction:
        m_hat = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
        v_hat = b2 * v / (1 - b2**t)
    else:
        m_hat = b1 * m + (1 - b1) * g
        v_hat = b2 * v
    r = m_hat / (np.sqrt(v_hat) + eps)
    u = r + weight_decay * x
    x = x - lr * trust_ratio(x, u, phi, norm, adapt) * u
    return x, (m, v)


def nnlamb(
    x: Array, g: Array, moments: Moments, t: int, *, lr: float, betas: tuple[float, float], eps: float,
    weight_decay: float, bias_correction: bool, phi: Phi, norm: str, adapt: bool, maximize: bool,
) -> tuple[Array, Moments]:  # fmt: skip
    """Algorithm 4 with constant coefficients: Nesterov's momentum on both moments."""
    b1, b2 = betas
    if maximize:
        g = -g
    m = b1 * moments[0] + (1 - b1) * g
    v = b2 * moments[1] + (1 - b2) * g**2
    if bias_correction:
        m_hat = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
        v_hat = b2 * v / (1 - b2 ** (t + 1)) + (1 - b2) * g**2 / (1 - b2**t)
    else:
        m_hat = b1 * m + (1 - b1) * g
        v_hat = b2 * v + (1 - b2) * g**2
    r = m_hat / (np.sqrt(v_hat) + eps)
    u = r + weight_decay * x
    x = x - lr * trust_ratio(x, u, phi, norm, adapt) * u
    return x, (m, v)


def lars_paper(
    x: Array, g: Array, m: Array, *, lr: float, momentum: float, weight_decay: float, nesterov: bool,
    phi: Phi, norm: str, adapt: bool, maximize: bool,
) -> tuple[Array, Array]:  # fmt: skip
    """Algorithm 1: weight decay inside the momentum, and the momentum itself normalised.

    Nesterov's variant is not the paper's: the average is looked at one step ahead, as Nadam does with m.
    """
    b1 = momentum
    if maximize:
        g = -g
    decayed = g + weight_decay * x
    m = b1 * m + (1 - b1) * decayed
    u = b1 * m + (1 - b1) * decayed if nesterov else m
    x = x - lr * trust_ratio(x, u, phi, norm, adapt) * u
    return x, m


def lars_2017(
    x: Array, g: Array, m: Array, *, lr: float, momentum: float, weight_decay: float, trust_coefficient: float,
    eps: float, nesterov: bool, phi: Phi, norm: str, adapt: bool, maximize: bool,
) -> tuple[Array, Array]:  # fmt: skip
    """The 2017 form: eeta ||x|| / (||g|| + lambda ||x|| + eps) scales the decayed gradient before it is accumulated.

    Taken from the code that trains with it, for the paper has only Algorithm 1: the ratio is 1 where the *gradient*
    is zero, decay or not. The buffer holds no learning rate, as in ``torch.optim.SGD``.
    """
    if maximize:
        g = -g
    x_length = length(x, norm)
    g_length = length(g, norm)
    ratio = 1.0
    if adapt and x_length > 0 and g_length > 0:
        ratio = trust_coefficient * phi_of(x_length, phi) / (g_length + weight_decay * x_length + eps)
    scaled = ratio * (g + weight_decay * x)
    m = momentum * m + scaled
    u = scaled + momentum * m if nesterov else m
    return x - lr * u, m
