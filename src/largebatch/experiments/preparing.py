"""The command that prepares a corpus: apart from the others, so that it starts without torch."""

import argparse
import sys

from largebatch import data
from largebatch.data.manifest import MANIFEST_NAME
from largebatch.errors import UserError


def prepare(options: argparse.Namespace) -> int:
    """`largebatch prepare`."""
    settings = {
        "vocab": options.vocab,
        "vocab_size": options.vocab_size,
        "lowercase": not options.cased,
        "text_field": options.text_field,
        "heldout": options.heldout,
        "workers": options.workers,
        "progress": sys.stderr.isatty(),
    }
    if options.part is not None:
        blocks = data.prepare_part(options.inputs, options.out, _part(options.part), **settings)
        if (options.out / MANIFEST_NAME).is_file():
            print(f"corpus: {options.out}, complete already: there is nothing to do for part {options.part}")
            return 0
        print(f"part {options.part} is done, in {options.out}.partial (blocks of about 4 MB: {blocks})")
        print("When all parts are done, the same command without --part puts them together.")
        return 0
    manifest = data.prepare(options.inputs, options.out, **settings)
    print(data.render_report(manifest))
    print(f"corpus: {options.out}")
    return 0


def _part(text: str) -> tuple[int, int]:
    try:
        k, n = map(int, text.split("/"))
    except ValueError:
        raise UserError(f"--part {text}: give k/n, as 3/8 for the third of eight parts") from None
    return k, n
