"""Every `largebatch bench`, with its figures kept: `python -m benchmarks [--device cuda] [--out FOLDER]`.

On a GPU the optimizers and BERT-large; on a CPU the optimizers under both settings of the allocator, the smaller BERTs
and the data path, some twenty minutes on two cores.
"""

import argparse
from datetime import date
from pathlib import Path

from largebatch.cli import main as largebatch

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run all, print the tables, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=RESULTS, help="a folder (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="what a GPU would run, on the CPU in small: minutes")
    options = parser.parse_args()
    today = date.today().isoformat()

    def bench(name: str, *arguments: str) -> None:
        figures = options.out / f"{today}-{options.device}-{name}.json"
        status = largebatch(["bench", *arguments, "--device", options.device, "--out", str(figures)])
        if status:
            raise SystemExit(status)

    plot = ("--plot", str(options.out / f"{today}-{options.device}-optim.png"))
    if options.dry_run:
        bench("dry-run-optim", "optim", "2000x1000", "--rounds", "2", "--only", "largebatch")
        small = ("--rounds", "1", "--sequences", "4", "--micro-batch", "2")
        bench("dry-run-bert", "bert", "tiny", "--lengths", "128", "--lengths", "512", *small)
        return
    if options.device == "cuda":
        bench("optim", "optim", "bert-base", "bert-large", "resnet-50", "2000x1000", *plot)
        bench("bert", "bert", "base", "large", "--lengths", "128", "--lengths", "512", "--micro-batch", "64")
        return
    bench("optim", "optim", *plot)
    bench("optim-default-allocator", "optim", "--allocator", "default")
    bench("bert", "bert", "tiny", "mini")
    bench("data", "data")


if __name__ == "__main__":
    main()
