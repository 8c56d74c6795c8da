"""The body of `largebatch bench`."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from largebatch.errors import UserError
from largebatch.experiments.console import show_table

from . import optim
from .timing import write_figures

Rows = list[dict[str, Any]]


def bench(options: argparse.Namespace) -> int:
    """Run one benchmark, print its table, and write the figures (and the plot) where asked."""
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine or this build of PyTorch has no GPU; leave it out for the CPU")
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = {"optim": _optim, "bert": _bert, "data": _data}[options.what](options, device)
    if options.out is not None:
        write_figures(options.out, rows, device)
        print(f"figures: {options.out}")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _optim(options: argparse.Namespace, device: torch.device) -> Rows:
    from .peers import MODELS

    models = options.models or list(MODELS)
    unknown = set(models) - set(MODELS)
    if unknown:
        raise UserError(f"{min(unknown)}: no such model here; choose among {', '.join(MODELS)}")
    rows = []
    for model in models:
        own = optim.bench_optim(
            [model], device, rounds=options.rounds or 20, tuned=options.allocator == "tuned",
            compiled=options.compiled, only=options.only, say=_say,
        )  # fmt: skip
        size = f"{own[0]['tensors']:,} tensors, {own[0]['parameters'] / 1e6:.1f}M parameters"
        show_table(
            f"One step of {model}: {size}, {options.allocator} allocator",
            ["", "ms", "ratio", "quartiles", "of copy", "extra MB"],
            [
                [
                    row["name"],
                    f"{row['ms']:.1f}",
                    f"{row['ratio']:.2f}",
                    "{:.2f} {:.2f}".format(*row["ratio_quartiles"]),
                    "" if row["of_copy_bandwidth"] is None else f"{row['of_copy_bandwidth']:.0%}",
                    "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e6:.1f}",
                ]
                for row in own
            ],
        )
        rows += own
    if options.plot is not None:
        optim.plot(rows, options.plot)
        print(f"plot: {options.plot}")
    return rows


def _bert(options: argparse.Namespace, device: torch.device) -> Rows:
    from .bert import bench_bert

    rows = bench_bert(
        options.models or ["tiny", "mini"], options.lengths or [128], device, rounds=options.rounds or 10,
        sequences=options.sequences, micro_batch=options.micro_batch, say=_say,
    )  # fmt: skip
    show_table(
        f"BERT, forward and backward, {rows[0]['dtype']}: real tokens",
        ["", "length", "ms", "tokens/s", "ours is faster", "MFU"],
        [
            [
                f"{row['model']}, {row['name']}",
                str(row["length"]),
                f"{row['ms']:.0f}",
                f"{row['tokens_per_s']:,.0f}",
                f"{row['largebatch_is_faster_by']:.2f}x",
                "" if row["mfu"] is None else f"{row['mfu']:.0%}",
            ]
            for row in rows
        ],
    )
    return rows


def _data(options: argparse.Namespace, device: torch.device) -> Rows:
    from .data import bench_data

    text: Path | None = options.text
    if text is not None and not text.is_file():
        raise UserError(f"{text}: no such file; name a plain text file")
    rows = bench_data(text, options.vocab, repeats=options.rounds or 3)
    preparing = [row for row in rows if row["benchmark"] == "preparing"]
    show_table(
        f"Preparing {preparing[0]['megabytes']:.1f} MB on {preparing[0]['cores']} cores",
        ["", "s", "MB/s", "ratio"],
        [[row["name"], f"{row['s']:.1f}", f"{row['mb_per_s']:.1f}", f"{row['ratio']:.2f}"] for row in preparing],
    )
    show_table(
        "Instances, one thread",
        ["", "per s", "token by token", "ratio", "epoch's table, s"],
        [
            [
                row["name"],
                f"{row['per_s']:,.0f}",
                f"{row['reference_per_s']:,.0f}",
                f"{row['ratio']:.0f}",
                f"{row['table_s']:.2f}",
            ]
            for row in rows
            if "table_s" in row
        ],
    )
    print(f"peak memory of this process: {rows[-1]['mb']:.0f} MB")
    return rows
