"""Token blocks of all input blocks, made by as many processes as wanted, each only once."""

import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from .blocks import Block, read_blocks
from .progress import Stage
from .sources import Source
from .tokenise import BlockTokeniser, TokenBlock
from .vocabulary import Vocabulary

_tokeniser: BlockTokeniser | None = None


def _start_worker(vocabulary: Vocabulary, lowercase: bool, text_field: str) -> None:
    global _tokeniser
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokeniser = BlockTokeniser(vocabulary, lowercase, text_field)


def _end_with_parent() -> None:
    """End this worker when its parent is killed: its siblings hold the queue open, so it would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(block: Block, path: Path) -> None:
    assert _tokeniser is not None
    _tokeniser(block).save(path)


def tokenise_blocks(
    sources: Sequence[Source],
    directory: Path,
    vocabulary: Vocabulary,
    lowercase: bool,
    text_field: str,
    workers: int,
    stage: Stage,
    part: tuple[int, int] | None = None,
) -> list[Path]:
    """Make the token block of every block that has none yet in `directory`; the paths of all, in input order.

    This process reads and cuts, `workers` others do the rest (with 1, this one does). At most `workers` + 2 blocks
    are under way at a time, so memory does not grow with the input. A block is named by its number and content. Of the
    k-th of n parts, blocks k, k + n, k + 2n, ... are made and returned.
    """
    paths: list[Path] = []

    def unfinished() -> Iterator[tuple[Block, Path]]:
        first, every = (part[0] - 1, part[1]) if part else (0, 1)
        for number, block in enumerate(read_blocks(sources, text_field, stage.advance)):
            if number % every != first:
                continue
            crc = 0
            for piece in block:
                crc = piece.crc32(crc)
            paths.append(directory / f"{number:07d}-{crc:08x}.block")
            if not TokenBlock.is_whole(paths[-1]):
                yield block, paths[-1]

    if workers == 1:
        tokeniser = BlockTokeniser(vocabulary, lowercase, text_field)
        for block, path in unfinished():
            tokeniser(block).save(path)
        return paths
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (vocabulary, lowercase, text_field)
    )
    running: set[Future[None]] = set()
    try:
        for block, path in unfinished():
            running.add(pool.submit(_work, block, path))
            if len(running) >= workers + 2:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
        for future in running:
            future.result()
    except BrokenProcessPool:
        raise RuntimeError(
            "a worker process ended without a word: out of memory, or a calling script that is not under "
            '`if __name__ == "__main__":`; the same command continues where this one stopped, and fewer workers need '
            "less memory"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return paths
