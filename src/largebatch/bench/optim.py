"""`largebatch bench optim`: one optimizer step, against torch's fused AdamW, which is the unit."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .peers import UNIT, Contender, contenders, parameters, shapes_of
from .timing import copy_bytes_per_s, gpu_seconds, interleaved, peak_extra_bytes, set_allocator

Say = Callable[[str], None]


def bench_optim(
    models: Sequence[str],
    device: torch.device,
    *,
    rounds: int = 20,
    tuned: bool = True,
    compiled: bool = False,
    only: str = "",
    say: Say = print,
) -> list[dict[str, Any]]:
    """Time every contender beside the unit, the two in turn, on the same parameters and gradients.

    On a GPU it is the GPU's time that counts, as training queues steps ahead of it; the time until the host has queued
    one, and waited for it, is told as well.

    Args:
        models: names, as for `peers.shapes_of`.
        device: where.
        rounds: how many, after two to warm up.
        tuned: whether freed memory is kept by the process, as the training command has it (`train.allocator`).
        compiled: whether to include those that compile for a minute.
        only: contenders whose name holds this; all by default.
        say: told what cannot be measured.

    Returns:
        A row for each model and contender: median milliseconds, ratio to the unit's in the same rounds, bytes moved
        and their share of the copy bandwidth, and memory that grows during a step. A contender that is not installed or
        fails has none, and ``say`` is told; the unit may not fail.
    """
    rows = []
    copy_speed = copy_bytes_per_s(device)
    for model in models:
        params = parameters(shapes_of(model), device)
        count = sum(x.numel() for x in params)
        unit, *others = contenders(device, compiled)
        for contender in [unit, *(each for each in others if only in each.name and (only or not each.by_name))]:
            setting = set_allocator(tuned)
            try:
                figures = _against_unit(contender, unit, params, device, rounds)
            except Exception as error:  # one contender's failure must not cost the others' figures
                if contender is unit:
                    raise
                reason = "not installed" if isinstance(error, ImportError) else "failed"
                say(f"{contender.name}: {reason} ({type(error).__name__}: {error})")
                continue
            moved = contender.bytes_per_parameter
            rows.append(
                {
                    "benchmark": "optimizer step",
                    "model": model,
                    "tensors": len(params),
                    "parameters": count,
                    "allocator": setting,
                    "name": contender.name,
                    **figures,
                    "bytes_per_parameter": moved,
                    "of_copy_bandwidth": moved and moved * count / (figures["ms"] / 1e3) / copy_speed,
                }
            )
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return rows


def _against_unit(
    contender: Contender, unit: Contender, params: list[torch.nn.Parameter], device: torch.device, rounds: int
) -> dict[str, Any]:
    step = contender.make(params)
    start = time.perf_counter()
    step()
    first_s = time.perf_counter() - start
    beside = step if contender.name == UNIT else unit.make(params)
    pair = {"unit": beside, "own": step}
    other, own = interleaved(pair, device, rounds).values()
    host_ms = {}
    if device.type == "cuda":
        lead_s = max(map(statistics.median, (other, own)))
        host_ms = {"host_ms": 1e3 * statistics.median(own)}
        other, own = interleaved(pair, device, rounds, clock=gpu_seconds(2 * lead_s + 1e-3)).values()
    ratios = [a / b for a, b in zip(own, other, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4) if rounds > 1 else 3 * ratios
    return {
        "ms": 1e3 * statistics.median(own),
        **host_ms,
        "ratio": statistics.median(own) / statistics.median(other),
        "ratio_quartiles": [quartiles[0], quartiles[2]],
        "first_step_s": first_s,
        "extra_bytes": peak_extra_bytes(step, device),
    }


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the ratios as bars, a panel for each model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in rows))
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure = Figure(figsize=(3.2 * len(models) + 2.4, 0.32 * len(names) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for panel, model in zip(panels, models, strict=True):
        of_model = {row["name"]: row["ratio"] for row in rows if row["model"] == model}
        ours = ["#1b6ca8" if name.startswith("largebatch") else "#b0b7bf" for name in names]
        panel.barh(names, [of_model.get(name, 0) for name in names], color=ours)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_xlim(0, 1.15 * max(of_model.values()))
        panel.set_title(model, fontsize=10)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
        for name, ratio in of_model.items():
            panel.annotate(f"{ratio:.2f}", (ratio, names.index(name)), xytext=(3, 0), textcoords="offset points",
                           va="center", fontsize=7)  # fmt: skip
    panels[0].invert_yaxis()
    figure.supxlabel(f"time of a step, in units of {UNIT}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
