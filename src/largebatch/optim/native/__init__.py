"""The backend for CPUs: a kernel in C, called once per step for all layers, with no temporary of a layer's size.

setup.py compiles it when the package is installed. The mathematics is in kernel.c, who does what in step.c, the threads
in threads.c, and locate.c finds the gradients; the Python here fills in two tables and calls. Its results are the same
bits on any number of threads and for every instruction set with fused multiply-adds.

A layer whose tensors do not all lie in memory in the same order without holes is copied for the step, and so is a
gradient of another order than its parameter's.
"""

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..backends import Backend, Layers, Steps
from ..checks import check
from .library import DESCEND, DIRECT, DTYPES, NORMS, RULES, load
from .locate import Locator, OwnLayouts, addresses
from .table import Table


class Native(Backend):
    """The backend that hands all layers to the C kernel."""

    name = "native"
    compiles = False
    by_layer = False

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.locate = Locator(library)

    def refuses(self, rule: str, params: Sequence[Tensor]) -> str | None:
        for x in params:
            if x.device.type != "cpu" or x.layout is not torch.strided:
                return f"it moves dense parameters on the CPU, and one is {x.layout} on {x.device}"
            if x.untyped_storage().device.type != "cpu":
                return "it moves parameters that have memory, and one is of a FakeTensorMode"
            if x.dtype not in DTYPES:
                return f"it moves float32, bfloat16 and float16 parameters, and one is {x.dtype}"
        return None

    def count(self, steps: Steps) -> list[float]:
        if steps.memo is None:
            steps.memo = OwnLayouts(steps.tensors)
        where: OwnLayouts = steps.memo
        if self.locate.again(where) is None:
            for step in steps.tensors:
                is_count = step.dtype is torch.float32 and step.device.type == "cpu" and step.numel() == 1
                check("step", step, is_count, "a float32 number on the CPU")
            where.found[:] = addresses(steps.tensors)
        counts = np.empty(len(where.found), np.float32)
        self.library.largebatch_count(where.arrays_at[0], len(counts), counts.ctypes.data)
        times: list[float] = counts.tolist()
        return times

    def step(self, rule: str, layers: Layers, norm: str) -> Tensor | None:
        if any(run.ratio is not None and callable(run.ratio.phi) for run in layers.runs):
            return None
        ratios = torch.empty(len(layers), dtype=torch.float64, device="cpu")
        self._run(rule, layers, norm, DIRECT | DESCEND, None, ratios)
        return ratios

    def direction(self, rule: str, layers: Layers, norm: str) -> tuple[Tensor, None]:
        measured = torch.empty(2, len(layers), dtype=torch.float64, device="cpu")
        self._run(rule, layers, norm, DIRECT, measured, None)
        return measured, None

    def apply(self, rule: str, layers: Layers, ratio: Tensor, memory: None) -> None:
        self._run(rule, layers, "l2", DESCEND, None, ratio.to(torch.float64).contiguous())

    def _run(
        self, rule: str, layers: Layers, norm: str, phases: int, measured: Tensor | None, ratios: Tensor | None
    ) -> None:
        table = layers.memo
        if table is None or not table.is_current():
            reason = self.refuses(rule, [layer.x for layer in layers])
            if reason is not None:
                raise ValueError(f"backend='native' cannot go on: {reason}")
            table = layers.memo = Table(layers, self.locate)
        numbers = table.enter_numbers(layers)
        pairs = table.substitute(layers)
        grads = table.enter_gradients(layers)
        if phases & DESCEND:  # before the step, which drives these objects from the caches
            torch.autograd.graph.increment_version(table.moved)
        self.library.largebatch_step(
            table.rows.ctypes.data,
            len(layers),
            numbers.ctypes.data,
            RULES[rule],
            NORMS[norm],
            phases,
            torch.get_num_threads(),
            None if measured is None else measured.data_ptr(),
            None if ratios is None else ratios.data_ptr(),
        )
        del grads
        for original, copy in pairs:
            original.copy_(copy)


BACKEND = Native(load())
