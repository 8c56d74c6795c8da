"""`largebatch profile`: some steps of a recipe under torch's profiler, and what they say in a few lines."""

import argparse
import itertools
import statistics
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from largebatch.errors import UserError
from largebatch.experiments.commands import configure
from largebatch.experiments.console import show_table
from largebatch.experiments.runner import prepare_engine
from largebatch.train import DTYPES, StepResult, allocator, distributed, hardware, threads
from largebatch.train.metrics import check_folder
from largebatch.train.step_clock import PARTS

_OPERATIONS = 12


def profile(options: argparse.Namespace) -> int:
    """Train some steps, the first two uncounted, tell where their time goes, and write a trace of the last one.

    Raises:
        UserError: no such stage, no folder to write to, or too many steps.
    """
    config = configure(options)
    out = options.out or Path("profiles") / options.recipe
    if not 0 <= options.stage < len(config.stages):
        raise UserError(f"--stage is {options.stage}; {options.recipe} has stages 0 to {len(config.stages) - 1}")
    check_folder(out)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    settings = allocator.keep_freed_memory()
    device = distributed.choose_device(config.device)
    config, _, engine = prepare_engine(config, device, print, only=options.stage)
    engine.breakdown = True
    engine.progress.stage = options.stage
    engine.stages = engine.stages[: options.stage + 1]
    steps = engine.run()
    list(itertools.islice(steps, 2))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    results = list(itertools.islice(steps, options.steps))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch_profile(activities=activities) as traced:
        results_traced = list(itertools.islice(steps, 1))
    steps.close()
    if not results or not results_traced:
        raise UserError(f"--steps is {options.steps}; the stage ends before: take fewer, or give it more steps")
    out.mkdir(parents=True, exist_ok=True)
    trace = out / "trace.json"
    traced.export_chrome_trace(str(trace))

    _show_parts(results, hardware.matmul_flops_per_s(device, DTYPES[config.precision]))
    _show_operations(traced, device)
    print(f"settings: {settings}; {threads.describe()}")
    print(f"trace: {trace} (open it at https://ui.perfetto.dev or in chrome://tracing)")
    return 0


def _show_parts(results: list[StepResult], peak_flops_per_s: float) -> None:
    total_s = statistics.median(result.step_s for result in results)
    rows = []
    for part in PARTS:
        seconds = statistics.median(result.parts_s[part] for result in results)
        rows.append([part, f"{1e3 * seconds:.1f}", f"{seconds / total_s:.1%}"])
    rows.append(["step", f"{1e3 * total_s:.1f}", ""])
    show_table(f"A step, median of {len(results)}", ["", "ms", "share"], rows)
    tokens = statistics.median(result.num_tokens / result.step_s for result in results)
    flops = statistics.median(result.flops / result.step_s for result in results)
    speed = f"{tokens:,.0f} real tokens/s, " if tokens else ""
    print(f"{speed}{flops / 1e9:,.0f} GFLOP/s, MFU {flops / peak_flops_per_s:.0%} of a measured matrix product")


def _show_operations(traced: torch_profile, device: torch.device) -> None:
    on_gpu = device.type == "cuda"

    def seconds(event: object) -> float:
        return float(getattr(event, "self_device_time_total" if on_gpu else "self_cpu_time_total")) * 1e-6

    found = traced.key_averages()
    if on_gpu:  # kernels alone: the operations that launched them claim their time as well
        found = [each for each in found if each.device_type is DeviceType.CUDA and not each.is_user_annotation]
    events = sorted(found, key=seconds, reverse=True)
    total_s = sum(map(seconds, events))
    rows = [
        [event.key[:48], f"{1e3 * seconds(event):.1f}", f"{seconds(event) / total_s:.1%}", f"{event.count:,}"]
        for event in events[:_OPERATIONS]
    ]
    show_table(f"Operations of one step on the {'GPU' if on_gpu else 'CPU'}", ["", "ms", "share", "calls"], rows)
