"""What the optimizer in the backward pass saves and costs; and what offloading costs on a CPU, where it saves nothing.

    python dev/memory_options.py --model base --batch 4

Memory is that of a process of its own for each kind of step: the most bytes of gradients that were there at once, and
the most memory that was resident. The times are of one process that takes the kinds of step in turn. dev/LOG.md has
the figures.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from largebatch import LAMB, param_groups
from largebatch.models import BertConfig, BertForPreTraining, pretraining_loss
from largebatch.optim import CPUOffload, optimizer_in_backward
from largebatch.train import allocator

LENGTH, MASKED = 128, 20
KINDS = ("ordinary", "in backward", "offloaded")


def random_batch(sequences: int, vocabulary: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first = torch.arange(sequences)[:, None] * LENGTH
    return {
        "input_ids": torch.randint(vocabulary, (sequences, LENGTH), generator=generator),
        "token_type_ids": torch.zeros(sequences, LENGTH, dtype=torch.int64),
        "attention_mask": torch.ones(sequences, LENGTH, dtype=torch.bool),
        "masked_positions": (first + torch.arange(1, MASKED + 1)).flatten(),
        "masked_labels": torch.randint(vocabulary, (sequences * MASKED,), generator=generator),
        "next_sentence_labels": torch.zeros(sequences, dtype=torch.int64),
    }


def stepper(kind: str, model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], None]:
    """Return a function that takes one step; the kinds share the model, and none leaves a gradient behind."""
    totals = {"masked": torch.tensor(float(len(batch["masked_labels"]))), "sequences": torch.tensor(float(LENGTH))}
    optimizer: torch.optim.Optimizer = LAMB(param_groups(model), lr=1e-4)
    if kind == "offloaded":
        optimizer = CPUOffload(optimizer)

    def step() -> None:
        handle = optimizer_in_backward(optimizer) if kind == "in backward" else None
        pretraining_loss(model, batch, totals)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        if handle is not None:
            handle.remove()

    return step


def alone(kind: str, model: nn.Module, batch: dict[str, Tensor]) -> None:
    """Print the memory of two steps."""
    params, most = list(model.parameters()), 0

    def look(_: Tensor) -> None:
        nonlocal most
        most = max(most, sum(x.numel() * x.itemsize for x in params if x.grad is not None))

    for x in params:
        x.register_post_accumulate_grad_hook(look)
    step = stepper(kind, model, batch)
    step()
    step()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{kind:12} gradients {most / 2**20:7.1f} MiB   resident {resident:7.0f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--batch", type=int, default=16, help=f"sequences of {LENGTH}")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    allocator.keep_freed_memory()
    torch.manual_seed(0)
    config = BertConfig.named(options.model)
    model, batch = BertForPreTraining(config), random_batch(options.batch, config.vocab_size)
    if options.kind:
        alone(options.kind, model, batch)
        return
    print(f"{sum(x.numel() for x in model.parameters()):,} parameters, {options.batch} sequences of {LENGTH}")
    for kind in KINDS:
        command = [sys.executable, str(Path(__file__)), "--model", options.model, "--batch", str(options.batch)]
        subprocess.run([*command, "--kind", kind], check=True)
    steps = {kind: stepper(kind, model, batch) for kind in KINDS}
    times_s: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(options.rounds + 1):
        for kind, step in steps.items():
            start = time.perf_counter()
            step()
            times_s[kind].append(time.perf_counter() - start)
    for kind in KINDS:
        ratio = statistics.median(a / b for a, b in zip(times_s[kind][1:], times_s[KINDS[0]][1:], strict=True))
        print(
            f"{kind:12} {1000 * statistics.median(times_s[kind][1:]):.0f} ms a step, {ratio:.3f} of the ordinary one's"
        )


if __name__ == "__main__":
    main()
