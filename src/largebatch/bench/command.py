"""The body of `largebatch bench`."""

import argparse
import os
import sys
from collections.abc import Callable
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
    for option, path in (("--out", options.out), ("--plot", options.plot)):
        if path is not None:
            _check_file(option, path)
    if options.plot is not None and options.plot.suffix.lower() != ".png":
        raise UserError(f"--plot {options.plot}: a PNG is drawn; give it a name that ends in .png")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    rows = {"optim": _optim, "bert": _bert, "data": _data}[options.what](options, device)
    if options.out is not None:
        write_figures(options.out, rows, device)
        print(f"figures: {options.out}")
    if options.what == "optim" and options.plot is not None:
        optim.plot(rows, options.plot)
        print(f"plot: {options.plot}")
    return 0


def _check_file(option: str, path: Path) -> None:
    """Refuse a file that could not be written once all is measured; nothing is made yet."""
    if path.is_dir():
        raise UserError(f"{option} {path} is a folder; name a file in it")
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    if nearest != path and not nearest.is_dir():
        raise UserError(f"{option} {path}: {nearest} is no folder; name another file")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"{option} {path}: there is no permission to write to {nearest}; name another file")


def _berts(options: argparse.Namespace) -> list[str]:
    """The sizes to measure, each of which is known."""
    from largebatch.models import BertConfig

    sizes: list[str] = options.models or ["tiny", "mini"]
    for size in sizes:
        BertConfig.named(size)
    return sizes


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
            ["", "ms", "ratio", "quartiles", "of copy", "extra MB", *(["host ms"] if "host_ms" in own[0] else [])],
            [
                [
                    row["name"],
                    f"{row['ms']:.1f}",
                    f"{row['ratio']:.2f}",
                    "{:.2f} {:.2f}".format(*row["ratio_quartiles"]),
                    "" if row["of_copy_bandwidth"] is None else f"{row['of_copy_bandwidth']:.0%}",
                    "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e6:.1f}",
                    *([f"{row['host_ms']:.1f}"] if "host_ms" in row else []),
                ]
                for row in own
            ],
        )
        rows += own
    return rows


def _bert(options: argparse.Namespace, device: torch.device) -> Rows:
    from largebatch.data import Corpus
    from largebatch.models import BertConfig

    from .bert import bench_bert

    sizes, lengths, config = _berts(options), options.lengths or [128], BertConfig()
    for length in lengths:
        if not 5 <= length <= config.max_position_embeddings:
            raise UserError(f"--lengths {length}: the models take 5 to {config.max_position_embeddings} tokens")
    corpus = None if options.data is None else Corpus.open(options.data)
    if corpus is not None and corpus.vocab_size > config.vocab_size:
        raise UserError(
            f"--data {options.data}: a vocabulary of {corpus.vocab_size:,}, and the models have the published one's "
            f"{config.vocab_size:,}; prepare the text with --vocab-size {config.vocab_size} or less"
        )
    rows = bench_bert(
        sizes, lengths, device, rounds=options.rounds or 10,
        sequences=options.sequences, micro_batch=options.micro_batch, corpus=corpus,
        peer_bf16=options.peer_bf16, say=_say,
    )  # fmt: skip
    show_table(
        f"BERT, forward and backward, {rows[0]['dtype']}: real tokens",
        ["", "length", "real", "ms", "tokens/s", "ours is faster", "MFU"],
        [
            [
                f"{row['model']}, {row['name']}",
                str(row["length"]),
                f"{row['real_share']:.0%}",
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

    for path in (options.text, options.vocab, options.google):
        if path is not None and not path.is_file():
            raise UserError(f"{path}: no such file")
    rows = bench_data(
        options.text, options.vocab, repeats=options.rounds or 3, sizes=_berts(options),
        grow_to=options.grow_to * 1_000_000, google=options.google, say=_say,
    )  # fmt: skip
    tables: dict[str, Rows] = {}
    for row in rows:
        tables.setdefault(row["benchmark"], []).append(row)
    for title, own in tables.items():
        header, cells = _DATA_TABLES[title]
        show_table(title[0].upper() + title[1:], ["", *header], [[row["name"], *cells(row)] for row in own])
    return rows


_DATA_TABLES: dict[str, tuple[list[str], Callable[[dict[str, Any]], list[str]]]] = {
    "preparing": (
        ["MB", "cores", "s", "MB/s", "tokens/s", "MB/s of CPU time", "ratio"],
        lambda row: [
            f"{row['megabytes']:.1f}",
            str(row["cores"]),
            f"{row['s']:.1f}",
            f"{row['mb_per_s']:.1f}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['mb_per_cpu_s']:.2f}",
            f"{row['ratio']:.2f}",
        ],
    ),
    "memory of preparing": (
        ["MB of text", "s", "peak MB"],
        lambda row: [
            f"{row['megabytes']:.0f}",
            f"{row['s']:.0f}",
            "not known here" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}",
        ],
    ),
    "instances, one core": (
        ["per s", "token by token", "ratio", "epoch's table, s"],
        lambda row: [
            f"{row['per_s']:,.0f}",
            f"{row['reference_per_s']:,.0f}",
            f"{row['ratio']:.0f}",
            f"{row['table_s']:.2f}",
        ],
    ),
    "text to ten epochs of instances, one core": (
        ["MB", "CPU s", "MB/s", "ratio"],
        lambda row: [
            f"{row['megabytes']:.1f}",
            f"{row['cpu_s']:.2f}",
            f"{row['mb_per_cpu_s']:.3f}",
            f"{row['ratio']:.1f}",
        ],
    ),
    "loader beside training": (
        ["step, ms", "sequences", "instances per CPU s", "wait", "its CPU time", "all it costs"],
        lambda row: [
            f"{row['step_ms']:.0f}",
            str(row["batch_size"]),
            f"{row['instances_per_cpu_s']:,.0f}",
            *(f"{row[share]:.2%}" for share in ("wait_share", "cpu_share", "cost_share")),
        ],
    ),
}
