"""How much memory a command and its children take at most; and a text as large as one likes to show it on."""

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from largebatch.errors import UserError

_EVERY_S = 0.05


def prepare_memory(text: Path, vocab: Path, grow_to: int = 0) -> dict[str, Any]:
    """Run `largebatch prepare` by itself, and tell the most memory it and its workers held at a time.

    Args:
        text: a text file, with blank lines between documents.
        vocab: a vocab.txt.
        grow_to: bytes to which the text is made to grow beforehand.
    """
    with tempfile.TemporaryDirectory() as folder:
        if grow_to > text.stat().st_size:
            text = grown(text, Path(folder) / "grown.txt", grow_to)
        out = Path(folder) / "corpus"
        start = time.perf_counter()
        peak = peak_bytes(
            [sys.executable, "-m", "largebatch", "prepare", str(text), "--out", str(out), "--vocab", str(vocab)]
        )
        return {
            "benchmark": "memory of preparing",
            "name": "largebatch prepare and its workers",
            "megabytes": text.stat().st_size / 1e6,
            "s": time.perf_counter() - start,
            "peak_mb": None if peak is None else peak / 1e6,
            "cores": len(os.sched_getaffinity(0)),
        }


def grown(text: Path, out: Path, num_bytes: int, seed: int = 0) -> Path:
    """Write the documents of a text to `out`, again and again, each time in another order, up to `num_bytes`.

    Every copy has a first line of its own, so that none is dropped as a duplicate.
    """
    documents = [document.strip() for document in text.read_text(encoding="utf-8").split("\n\n")]
    order = random.Random(seed)
    written = copy = 0
    with out.open("wb") as file:
        while written < num_bytes:
            copy += 1
            order.shuffle(documents)
            for document in filter(None, documents):
                written += file.write(f"Copy number {copy}.\n{document}\n\n".encode())
                if written >= num_bytes:
                    break
    return out


def peak_bytes(command: Sequence[str]) -> int | None:
    """Run a command, and return the largest sum of the resident memory of it and all its descendants.

    Pages that processes share count once for each, so this is an upper bound. It is sampled 20 times a second. None
    where there is no /proc to read it from.

    Raises:
        UserError: the command fails; its last line says why.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        peak = 0
        while process.poll() is None:
            peak = max(peak, sum(map(_resident_bytes, _descendants(process.pid))))
            time.sleep(_EVERY_S)
        if process.returncode:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            raise UserError(f"{command[0]}: failed: {lines[-1] if lines else f'exit status {process.returncode}'}")
    return peak or None


def _descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    found = [root]
    for process in found:
        found += children.get(process, [])
    return found


def _resident_bytes(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0
