"""Every `largebatch bench`, with its figures kept: `python -m benchmarks [--device cuda] [--out FOLDER]`.

On a GPU the optimizers and BERT-large; on a CPU the optimizers under both settings of the allocator, the smaller BERTs
and the data path, some twenty minutes on two cores. Each is a process of its own, so that one that fails or hangs takes
no other's figures with it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import largebatch

RESULTS = Path(__file__).parent / "results"
QUESTIONS = Path(largebatch.__file__).parent / "assets" / "squad_extract" / "train.json"

Bench = Callable[..., None]


def main() -> None:
    """Run all, print the tables, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=RESULTS, help="a folder (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="what a GPU would run, on the CPU in small: minutes")
    parser.add_argument("--budget-s", type=float, help="begin none after this, and end all by it")
    options = parser.parse_args()
    end = time.monotonic() + (options.budget_s or float("inf"))
    failed = []

    def bench(name: str, *arguments: str, limit_s: float = float("inf")) -> None:
        left_s = min(limit_s, end - time.monotonic())
        if left_s < 10:
            failed.append(f"{name}: no time left")
            return
        figures = options.out / f"{date.today().isoformat()}-{options.device}-{name}.json"
        command = [sys.executable, "-m", "largebatch", "bench", *arguments]
        command += ["--device", options.device, "--out", str(figures)]
        try:
            subprocess.run(command, timeout=None if left_s == float("inf") else left_s, check=True)
        except subprocess.CalledProcessError as error:
            failed.append(f"{name}: exit status {error.returncode}")
        except subprocess.TimeoutExpired:
            failed.append(f"{name}: stopped after {left_s:.0f} s")

    if options.dry_run or options.device == "cuda":
        on_gpu(bench, dry=options.dry_run)
    else:
        plot = options.out / f"{date.today().isoformat()}-cpu-optim.png"
        bench("optim", "optim", "--plot", str(plot))
        bench("optim-default-allocator", "optim", "--allocator", "default")
        bench("bert", "bert", "tiny", "mini")
        bench("data", "data")
    for line in failed:
        print(f"benchmark failed: {line}", file=sys.stderr)
    raise SystemExit(bool(failed))


def on_gpu(bench: Bench, *, dry: bool) -> None:
    """Run what the figures of a GPU are of: what matters most first, what may hang last."""

    def optim(model: str, only: str = "", seconds: float = 60) -> None:
        kind = f"optim-{model}{only and '-'}{only.replace(' ', '-')}"
        few = ("--rounds", "2", "--only", "largebatch") if dry else ("--only", only)
        bench(kind, "optim", "2000x1000" if dry else model, *few, limit_s=seconds)

    def bert(size: str, length: int, sequences: int, *others: str) -> None:
        kind = f"bert-{size}-{length}{'-passages' if others else ''}"
        count = "2" if dry else str(sequences)
        share = ("--sequences", count, "--micro-batch", count, "--rounds", "1" if dry else "10", *others)
        bench(kind, "bert", "tiny" if dry else size, "--lengths", str(length), *share, limit_s=90)

    optim("bert-large")
    bert("large", 128, 256)
    bert("large", 512, 64)
    with tempfile.TemporaryDirectory() as folder:
        bert("large", 512, 64, "--data", passages(Path(folder)))
    for model in ("bert-base", "resnet-50", "2000x1000"):
        optim(model)
    bert("base", 128, 512)
    optim("bert-large", only="one launch", seconds=30)


def passages(folder: Path) -> str:
    """Prepare the shipped passages, each a document, and return the corpus: at 512 most of it is padding."""
    text = folder / "passages.txt"
    articles = json.loads(QUESTIONS.read_text(encoding="utf-8"))["data"]
    paragraphs = [" ".join(each["context"].split()) for article in articles for each in article["paragraphs"]]
    text.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    corpus = folder / "corpus"
    command = [sys.executable, "-m", "largebatch", "prepare", str(text), "--out", str(corpus), "--vocab-size", "8192"]
    subprocess.run(command, check=False, stdout=subprocess.DEVNULL)  # if it fails, so does what wants the corpus
    return str(corpus)


if __name__ == "__main__":
    main()
