"""LAMB against Keras', which decays the weights before the update and outside of the trust ratio.

Without decay that is the paper's LAMB; with it, our `decoupled_weight_decay`.
"""

import os

import numpy as np
import pytest
from oracle_problem import DIFFERENT, DTYPES, LR, STEPS, Arrays, assert_same, by_torch, difference, gradients, start

from largebatch import LAMB

os.environ.setdefault("KERAS_BACKEND", "torch")  # read when keras is imported
keras = pytest.importorskip("keras")


@pytest.fixture(autouse=True)
def _restore_floatx():
    before = keras.config.floatx()
    yield
    keras.config.set_floatx(before)


def by_keras(dtype: type, **decay: float) -> Arrays:
    keras.config.set_floatx(np.dtype(dtype).name)
    layers = [keras.Variable(x, dtype=np.dtype(dtype).name) for x in start(dtype)]
    optimizer = keras.optimizers.Lamb(LR, **decay)
    optimizer.build(layers)
    for step in range(STEPS):
        g = gradients([x.value.detach().numpy().copy() for x in layers], step)
        optimizer.apply([keras.ops.convert_to_tensor(x) for x in g], layers)
    return [x.value.detach().numpy().copy() for x in layers]


# Keras reckons the bias corrections in the variables' dtype. In float32, 1 - βᵗ is then off by up to 6e-8/(1e-3·t) of
# it, and the step by as much from the two together, which the trust ratio cancels everywhere but in a layer that starts
# at zero. Over t = 1 to 20 that is 6e-5 · 3.6, of the 20 equal steps which that layer is made of.
COARSE = 2.2e-4 / STEPS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", [{}, {"weight_decay": 0.3}], ids=["as it comes", "decaying"])
def test_lamb(dtype: type, decay: dict[str, float]) -> None:
    theirs = by_keras(dtype, **decay)
    settings = {**LAMB.dialect("keras"), **decay}
    tolerance = COARSE if dtype is np.float32 else 0.0
    assert_same(by_torch(lambda params: LAMB(params, LR, **settings), dtype), theirs, tolerance)
    other = {**settings, "bias_correction": False}
    assert difference(by_torch(lambda params: LAMB(params, LR, **other), dtype), theirs) > DIFFERENT


def test_without_decay_it_is_the_papers() -> None:
    settings = {**LAMB.dialect("paper"), "weight_decay": 0.0, "eps": 1e-7}
    assert_same(by_torch(lambda params: LAMB(params, LR, **settings), np.float64), by_keras(np.float64))
    settings["weight_decay"] = 0.3
    theirs = by_keras(np.float64, weight_decay=0.3)
    assert difference(by_torch(lambda params: LAMB(params, LR, **settings), np.float64), theirs) > DIFFERENT
