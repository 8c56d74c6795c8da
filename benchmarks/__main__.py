"""Optimizer step, BERT step and data pipeline, as a short table: `python -m benchmarks [--device cuda] [--out FILE]`.

Each comparison runs in one process, its members in turn, round after round, and is told as the ratio of medians: on a
shared machine single timings are noise.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

import largebatch
from largebatch.data import Corpus, PretrainingInstances, prepare
from largebatch.experiments.pretraining import as_micro_batch
from largebatch.models import BertConfig, BertForPreTraining, pretraining_loss, training_flops
from largebatch.train import allocator, hardware

ROUNDS = 20
DEMO_TEXT = Path(largebatch.__file__).parent / "assets" / "demo_corpus"


def interleaved(contenders: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Median seconds of each contender over `ROUNDS` rounds in which all take their turn, after two to warm up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS + 2):
        for name, work in contenders.items():
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def optimizer_step(device: torch.device, size: str) -> list[dict[str, object]]:
    """One step over a BERT's parameters, against torch's fused AdamW, which is the unit."""
    with torch.device("meta"):
        shapes = [tuple(parameter.shape) for parameter in BertForPreTraining(BertConfig.named(size)).parameters()]

    def contender(make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]) -> Callable[[], object]:
        parameters = [torch.nn.Parameter(torch.randn(shape, device=device) * 0.02) for shape in shapes]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        return make(parameters).step

    seconds = interleaved(
        {
            "torch AdamW fused": contender(lambda p: torch.optim.AdamW(p, fused=True)),
            "torch AdamW foreach": contender(lambda p: torch.optim.AdamW(p, foreach=True)),
            "largebatch LAMB reference": contender(lambda p: largebatch.LAMB(p, backend="reference")),
            "largebatch LAMB foreach": contender(lambda p: largebatch.LAMB(p, backend="foreach")),
            "largebatch LARS": contender(lambda p: largebatch.LARS(p, lr=0.1)),
        },
        device,
    )
    unit = seconds["torch AdamW fused"]
    return [
        {"benchmark": f"optimizer step, bert-{size}", "name": name, "ms": 1e3 * s, "ratio": s / unit}
        for name, s in seconds.items()
    ]


def text_path(device: torch.device, size: str, length: int) -> list[dict[str, object]]:
    """Instances made, and forward and backward on them, over the shipped text with its own padding."""
    with tempfile.TemporaryDirectory() as folder:
        corpus_path = Path(folder) / "corpus"
        start = time.perf_counter()
        prepare([DEMO_TEXT], corpus_path, vocab_size=8192, progress=False)
        prepare_s = time.perf_counter() - start
        corpus = Corpus.open(corpus_path)
        instances = PretrainingInstances(corpus.split("train"), length, seed=0)
        rows = np.arange(64) % instances.num_instances(0)
        config = BertConfig.named(size, vocab_size=corpus.vocab_size)
        arrays = instances.batch(0, rows)
        micro_batch = {name: tensor.to(device) for name, tensor in as_micro_batch(arrays).items()}
        model = BertForPreTraining(config).to(device)
        totals = {"masked": torch.tensor(1000.0, device=device), "sequences": torch.tensor(64.0, device=device)}
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=hardware.bf16_is_fast(device))

        def step() -> None:
            with autocast:
                loss, _ = pretraining_loss(model, micro_batch, totals)
            loss.backward()
            model.zero_grad(set_to_none=True)

        seconds = interleaved({"instances": lambda: instances.batch(0, rows), "step": step}, device)
    flops = training_flops(config, arrays["lengths"], len(arrays["masked_labels"]))
    tokens_per_s = int(arrays["lengths"].sum()) / seconds["step"]
    dtype = torch.bfloat16 if hardware.bf16_is_fast(device) else torch.float32
    peak = hardware.matmul_flops_per_s(device, dtype)
    return [
        {"benchmark": "prepare", "name": "shipped text, all cores", "s": prepare_s},
        {"benchmark": f"instances, length {length}", "name": "one thread", "per_s": 64 / seconds["instances"]},
        {
            "benchmark": f"bert-{size}, length {length}",
            "name": "forward and backward",
            "tokens_per_s": tokens_per_s,
            "sequences_per_s": 64 / seconds["step"],
            "mfu": flops / seconds["step"] / peak,
        },
    ]


def main() -> None:
    """Run all, print a table, and write the figures where asked."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    device = torch.device(options.device)
    settings = allocator.keep_freed_memory()
    size = "large" if device.type == "cuda" else "mini"
    rows = optimizer_step(device, "large" if device.type == "cuda" else "base") + text_path(device, size, 128)
    for row in rows:
        figures = ", ".join(f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float))
        print(f"{row['benchmark']:28s} {row['name']:26s} {figures}")
    if options.out is not None:
        content = {"environment": hardware.describe(device, settings), "figures": rows}
        options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
