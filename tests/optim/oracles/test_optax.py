"""LAMB and LARS against optax's, which another team wrote for another framework.

Guards the mathematics of the paper's LAMB, and of LARS where optax means the same by it: optax divides by ‖g + λx‖
where the 2017 form divides by ‖g‖ + λ‖x‖, so that the two agree without weight decay only.
"""

import numpy as np
import pytest
from oracle_problem import DIFFERENT, DTYPES, LR, STEPS, Arrays, assert_same, by_torch, difference, gradients, start

from largebatch import LAMB, LARS

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")


@pytest.fixture(autouse=True)
def _float64() -> None:
    jax.config.update("jax_enable_x64", True)


def by_optax(transformation: "optax.GradientTransformation", dtype: type) -> Arrays:
    layers = [jax.numpy.asarray(x) for x in start(dtype)]
    state = transformation.init(layers)
    for step in range(STEPS):
        g = [jax.numpy.asarray(x) for x in gradients([np.asarray(x) for x in layers], step)]
        updates, state = transformation.update(g, state, layers)
        layers = optax.apply_updates(layers, updates)
    assert layers[0].dtype == dtype
    return [np.asarray(x) for x in layers]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", [{}, {"weight_decay": 0.3}], ids=["as it comes", "decaying"])
def test_lamb(dtype: type, decay: dict[str, float]) -> None:
    settings = {**LAMB.dialect("optax"), **decay}
    theirs = by_optax(optax.lamb(LR, **decay), dtype)
    assert_same(by_torch(lambda params: LAMB(params, LR, **settings), dtype), theirs)
    other = {**settings, "bias_correction": "folded"}
    assert difference(by_torch(lambda params: LAMB(params, LR, **other), dtype), theirs) > DIFFERENT


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nesterov", [False, True])
def test_lars_without_decay(dtype: type, nesterov: bool) -> None:
    theirs = by_optax(optax.lars(LR, weight_decay=0.0, trust_coefficient=0.5, momentum=0.9, nesterov=nesterov), dtype)
    settings = {"form": "2017", "weight_decay": 0.0, "trust_coefficient": 0.5, "nesterov": nesterov}
    assert_same(by_torch(lambda params: LARS(params, LR, **settings), dtype), theirs)
    other = {**settings, "form": "paper"}
    assert difference(by_torch(lambda params: LARS(params, LR, **other), dtype), theirs) > DIFFERENT


def test_lars_with_decay_divides_by_another_norm() -> None:
    theirs = by_optax(optax.lars(LR, weight_decay=0.3, trust_coefficient=0.5), np.float64)
    settings = {"form": "2017", "weight_decay": 0.3, "trust_coefficient": 0.5}
    assert difference(by_torch(lambda params: LARS(params, LR, **settings), np.float64), theirs) > DIFFERENT
