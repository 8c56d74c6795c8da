"""The `largebatch` command: thin, and each command imports its code when it runs.

Exit status: 0; 2 for a user's mistake; 130 when interrupted with a checkpoint written; 1 for ours.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from largebatch.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    options = build_parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    if arguments is None and command in (_demo, _train, _finetune, _bench, _profile):
        from largebatch.train import threads

        threads.restart_to_wait_briefly()
        threads.fit_threads_to_quota()
    one_of_many = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE") != "1"
    try:
        is_alone = command not in (_train, _finetune) or getattr(options, "list", False)
        if one_of_many and is_alone and (rank := os.environ.get("RANK")) != "0":
            print(f"largebatch: this command runs in one process, rank 0's; rank {rank} is idle", file=sys.stderr)
            return 0
        return command(options)
    except UserError as error:
        if one_of_many:
            from largebatch.train.distributed import let_first_rank_speak

            let_first_rank_speak()
        print(f"largebatch: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("largebatch: interrupted", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    from largebatch import __version__

    parser = argparse.ArgumentParser(
        prog="largebatch",
        description="Train with very large batches: from raw text to an evaluated BERT, and the LAMB paper's runs.",
    )
    parser.add_argument("--version", action="version", version=f"largebatch {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = commands.add_parser("demo", help="raw text to an evaluated BERT and a report, in minutes on a laptop CPU")
    demo.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="folder for the demo's runs (default: %(default)s)"
    )
    demo.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the pre-training"
    )
    demo.set_defaults(command=_demo)

    plan = commands.add_parser(
        "plan", help="batch size -> learning rate, warm-up and steps, by the paper's untuned rules"
    )
    plan.add_argument("workload", help="bert or resnet50")
    plan.add_argument("batch_size", help="one batch size, or one for each stage joined by commas: 65536,32768")
    plan.add_argument(
        "--rates", default="sqrt", help="whose rates: sqrt (the paper's rule) or nvidia (default: %(default)s)"
    )
    plan.add_argument("--samples", type=int, help="samples of the whole run, where they are not the paper's")
    plan.add_argument("--rewarmup", action="store_true", help="warm up again in every stage")
    plan.set_defaults(command=_plan)

    prepare = commands.add_parser("prepare", help="raw text -> documents -> sentences -> WordPiece -> token shards")
    prepare.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="text, JSONL or Parquet files, folders of them, or hf:NAME"
    )
    prepare.add_argument("--out", type=Path, required=True, help="folder for the corpus")
    prepare.add_argument(
        "--vocab", type=Path, help="a vocab.txt to use, or a folder with one; otherwise one is trained on the text"
    )
    prepare.add_argument(
        "--vocab-size", type=int, default=30522, help="size of the trained vocabulary (default: %(default)s)"
    )
    prepare.add_argument(
        "--cased",
        action="store_true",
        help="keep upper case and accents; a tokenizer_config.json beside --vocab has to say the same",
    )
    prepare.add_argument(
        "--text-field", default="text", help="field of JSONL, Parquet and hf: inputs (default: %(default)s)"
    )
    prepare.add_argument(
        "--heldout", type=float, default=0.01, help="share of documents held out (default: %(default)s)"
    )
    prepare.add_argument("--workers", type=int, help="processes (default: one for each core)")
    prepare.add_argument(
        "--part", metavar="K/N", help="do the K-th of N shares, beside others; without it, put them together"
    )
    prepare.set_defaults(command=_prepare)

    train = commands.add_parser("train", help="train any recipe into a run directory; the same under torchrun")
    train.add_argument("recipe", nargs="?", help="a recipe's name; --list shows all")
    train.add_argument("--list", action="store_true", help="list the recipes, or with a RECIPE its settings")
    _add_training_options(train)
    train.add_argument("--data", help="what the recipe reads: a corpus of `prepare`, or a folder of images")
    train.set_defaults(command=_train)

    profile = commands.add_parser("profile", help="where a recipe's step spends its time: a table, a trace, the memory")
    profile.add_argument("recipe", help="a recipe's name")
    _add_training_options(profile, resumes=False)
    profile.add_argument("--data", help="what the recipe reads: a corpus of `prepare`, or a folder of images")
    profile.add_argument("--steps", type=_count, default=5, help="steps that count (default: %(default)s)")
    profile.add_argument("--stage", type=int, default=0, help="of which stage, from 0 (default: %(default)s)")
    profile.set_defaults(command=_profile)

    finetune = commands.add_parser("finetune", help="fine-tune and evaluate a pre-trained encoder")
    finetune.add_argument("task", choices=["squad"], help="question answering in SQuAD v1.1's format")
    finetune.add_argument("--model", help="a run of `train`, or a folder in Hugging Face's format")
    finetune.add_argument("--train", help="training JSON; several joined by commas")
    finetune.add_argument("--test", help="evaluation JSON; needed, as are --model and --train")
    finetune.add_argument("--epochs", type=float, help="passes over the training set (default: 2)")
    finetune.add_argument(
        "--skip-bad-answers", action="store_true", help="leave out answers that are not where the file says"
    )
    _add_training_options(finetune)
    finetune.set_defaults(command=_finetune)

    evaluate = commands.add_parser("evaluate", help="evaluate a run, or score a file of SQuAD predictions")
    evaluate.add_argument(
        "run", type=Path, nargs="?", help="a run directory: its newest checkpoint on its held-out data"
    )
    evaluate.add_argument(
        "--squad", help="a SQuAD JSON file to answer with the run's model, or to score --predictions on"
    )
    evaluate.add_argument("--data", type=Path, help="where the run's corpus or images lie, if they have moved")
    evaluate.add_argument("--predictions", help="a JSON file of question id -> answer")
    evaluate.set_defaults(command=_evaluate)

    export = commands.add_parser("export", help="write a run's model for `transformers`")
    export.add_argument("run", type=Path, help="a run directory of BERT")
    export.add_argument("--to", choices=["hf"], default="hf", help="the format (default: %(default)s)")
    export.add_argument("--out", type=Path, help="the folder to write (default: RUN/hf)")
    export.set_defaults(command=_export)

    report = commands.add_parser("report", help="tables and figures of runs, as HTML and Markdown")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories")
    report.add_argument("--out", type=Path, help="folder for the report (default: report/ in the first run)")
    report.set_defaults(command=_report)
    bench = commands.add_parser("bench", help="time an optimizer step, BERT or the data path beside installed peers")
    bench.add_argument("what", choices=["optim", "bert", "data"], help="what to time")
    bench.add_argument("models", nargs="*", help="optim: bert-base, ..., resnet-50, 2000x1000; bert, data: tiny, ...")
    bench.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where (default: %(default)s)")
    bench.add_argument("--rounds", type=_count, help="rounds that count (default: 20, 10 and 3)")
    bench.add_argument("--threads", type=_count, help="CPU threads (default: torch's choice)")
    bench.add_argument(
        "--allocator", choices=["tuned", "default"], default="tuned", help="optim: glibc's (%(default)s)"
    )
    bench.add_argument("--compiled", action="store_true", help="optim: also a compiled peer; its first step takes long")
    bench.add_argument("--only", default="", metavar="TEXT", help="optim: only those whose name holds this")
    bench.add_argument("--plot", type=Path, help="optim: a PNG to draw")
    bench.add_argument("--lengths", type=_count, action="append", help="bert: a sequence length; may be given again")
    bench.add_argument("--sequences", type=_count, default=64, help="bert: sequences of a step (default: %(default)s)")
    bench.add_argument("--micro-batch", type=_count, default=32, help="bert: of them at a time (default: %(default)s)")
    bench.add_argument(
        "--peer-bf16", action="store_true", help="bert: transformers under bfloat16 autocast in any case"
    )
    bench.add_argument("--data", type=Path, help="bert: a corpus of `prepare` (default: the shipped text)")
    bench.add_argument("--text", type=Path, help="data: a plain text file (default: the shipped one)")
    bench.add_argument("--vocab", type=Path, help="data: a vocab.txt (default: 8,192 pieces, trained first)")
    bench.add_argument(
        "--grow-to", type=int, default=0, metavar="MB", help="data: show the memory on the text repeated to this size"
    )
    bench.add_argument(
        "--google", type=Path, metavar="PYTHON", help="data: an interpreter with tensorflow and tf-models-official"
    )
    bench.add_argument("--out", type=Path, help="a JSON file for the figures")
    bench.set_defaults(command=_bench)
    return parser


def _count(text: str) -> int:
    """The type of options that count something."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return number


def _add_training_options(parser: argparse.ArgumentParser, resumes: bool = True) -> None:
    what = "the run directory (default: runs/RECIPE)" if resumes else "folder for the trace (default: profiles/RECIPE)"
    parser.add_argument("--out", type=Path, help=what)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting, as optim.lr=1e-3"
    )
    if resumes:
        parser.add_argument(
            "--resume", action="store_true", help="go on from the newest checkpoint in --out, bit for bit"
        )
    parser.add_argument("--threads", type=_count, help="CPU threads (default: torch's choice)")


def _demo(options: argparse.Namespace) -> int:
    from largebatch.experiments.demo import demo

    return demo(options.out, options.set)


def _plan(options: argparse.Namespace) -> int:
    from largebatch.scaling import plan

    if re.fullmatch(r"\d{1,3}(,\d{3})+", options.batch_size):
        first, *rest = options.batch_size.split(",")
        if rest[0][0] == "0" or int(rest[0]) > 4 * int(first):  # as of no two stages
            number = options.batch_size.replace(",", "")
            raise UserError(f"batch_size is {options.batch_size!r}; it must be written without commas: {number}")
    try:
        batches = tuple(int(part) for part in options.batch_size.split(","))
    except ValueError:
        raise UserError(
            f"batch_size is {options.batch_size!r}; it must be a whole number, or several joined by commas: 65536,32768"
        ) from None
    try:
        print(
            plan(
                options.workload,
                batches[0] if len(batches) == 1 else batches,
                recipe=options.rates,
                samples=options.samples,
                rewarmup=True if options.rewarmup else None,
            )
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    return 0


def _prepare(options: argparse.Namespace) -> int:
    from largebatch.experiments.preparing import prepare

    return prepare(options)


def _train(options: argparse.Namespace) -> int:
    from largebatch.experiments.commands import train

    return train(options)


def _profile(options: argparse.Namespace) -> int:
    from largebatch.experiments.profiling import profile

    return profile(options)


def _finetune(options: argparse.Namespace) -> int:
    from largebatch.experiments.commands import finetune

    return finetune(options)


def _evaluate(options: argparse.Namespace) -> int:
    from largebatch.experiments.commands import evaluate

    return evaluate(options)


def _export(options: argparse.Namespace) -> int:
    from largebatch.experiments.commands import export

    return export(options)


def _report(options: argparse.Namespace) -> int:
    from largebatch.experiments.commands import report

    return report(options)


def _bench(options: argparse.Namespace) -> int:
    from largebatch.bench.command import bench

    return bench(options)


if __name__ == "__main__":
    sys.exit(main())
