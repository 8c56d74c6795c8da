"""Where `prepare` works: ``<out>.partial``, kept after a kill so that the next run continues, gone after success."""

import json
import os
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

from largebatch.errors import UserError

from .manifest import MANIFEST_NAME, Manifest
from .vocabulary import Vocabulary


class Workspace:
    """The directory of the work in progress, locked against a second run.

    Args:
        out: the directory that will hold the corpus.
        part: (k, n) of a run that does a part beside others, None for one that ends the work. Parts share the
            directory with each other, and clear nothing away.

    Attributes:
        out: where the corpus will lie, links followed: what is renamed must be the directory itself.
        directory: the directory of the work.
    """

    def __init__(self, out: Path, part: tuple[int, int] | None = None) -> None:
        self.out = Path(os.path.realpath(out)) if os.path.islink(out) else out
        self._part = part
        if not self.out.name:
            raise UserError(f"{out}: name a directory to make")
        self.directory = self.out.with_name(self.out.name + ".partial")
        self._result = self.directory / "corpus"
        self._replace = False
        self._done = False

    def __enter__(self) -> "Workspace":
        is_corpus = os.path.isfile(self.out / MANIFEST_NAME)  # False where it cannot be asked, which `mkdir` will say
        if not is_corpus:
            self._check_no_mount()
        if os.path.lexists(self.out) and not os.path.isdir(self.out):
            raise UserError(f"{self.out}: a file of that name is in the way; choose another output directory")
        if os.path.isdir(self.out) and any(self.out.iterdir()) and not is_corpus:
            raise UserError(f"{self.out}: not empty and not a corpus; choose another output directory or empty it")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.directory}: cannot be made: {error.strerror}") from None
        self._locks = [(self.directory / "lock").open("w")]
        if self._part is not None:
            self._locks.append((self.directory / "lock-{}-of-{}".format(*self._part)).open("w"))
        try:
            import fcntl

            shared = fcntl.LOCK_EX if self._part is None else fcntl.LOCK_SH
            for lock, kind in zip(self._locks, (shared, fcntl.LOCK_EX), strict=False):
                fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except ImportError:  # no such locks on this system
            pass
        except OSError:
            self._unlock()
            raise UserError(f"{self.out}: another run is preparing this corpus right now; wait for it") from None
        return self

    def _unlock(self) -> None:
        for lock in self._locks:
            lock.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        spent = self._part is None and isinstance(error, UserError) and not self._blocks()
        if self._done or spent:
            shutil.rmtree(self.directory, ignore_errors=True)
        self._unlock()

    def _blocks(self) -> list[Path]:
        """All finished blocks, of whichever plan."""
        return list(self.directory.glob("blocks-*/*.block"))

    def existing(self, settings: dict[str, Any], inputs: list[dict[str, Any]], overwrite: bool) -> Manifest | None:
        """The manifest of the corpus at `out` if it is the one asked for, None if there is none.

        Raises:
            UserError: there is another one, and it is not to be overwritten.
        """
        if not (self.out / MANIFEST_NAME).is_file():
            return None
        try:
            manifest = Manifest.read(self.out)
            intact = all((self.out / name).stat().st_size == file["bytes"] for name, file in manifest.files.items())
        except (UserError, OSError):
            if not overwrite:
                raise UserError(
                    f"{self.out}: holds a damaged corpus; delete it to prepare it again (in Python, or overwrite=True)"
                ) from None
        else:
            if intact and manifest.settings == settings and manifest.inputs == inputs:
                self._done = True
                return manifest
            if not overwrite:
                raise UserError(
                    f"{self.out}: already holds a corpus of other inputs or settings, or by another largebatch; "
                    "choose another directory, or delete it first (in Python, or overwrite=True)"
                )
        self._check_no_mount()
        self._replace = True
        return None

    def _check_no_mount(self) -> None:
        if os.path.ismount(self.out):
            raise UserError(f"{self.out}: a mount point, which cannot be replaced; name a directory inside it")

    def vocabulary(self, plan: dict[str, Any], make: Callable[[], Vocabulary]) -> Vocabulary:
        """The vocabulary of an earlier, interrupted run of the same plan, or a new one."""
        path = self.directory / f"vocab-{_fingerprint(plan)}.txt"
        if path.is_file():
            return Vocabulary.read(path)
        vocabulary = make()
        temporary = path.with_suffix(f".{uuid4().hex}.tmp")  # parts may write it at once
        temporary.write_text("".join(token + "\n" for token in vocabulary.tokens), encoding="utf-8")
        temporary.replace(path)
        return vocabulary

    def start_blocks(self, plan: dict[str, Any]) -> Path:
        """Make the directory of token blocks, or keep the one of an interrupted run of the same plan.

        Raises:
            UserError: parts that are to be put together were made by another plan.
        """
        blocks = self.directory / f"blocks-{_fingerprint(plan)}"
        if self._part is None:
            of_parts = any(self.directory.glob("lock-*-of-*"))
            if of_parts and (others := {path.parent for path in self._blocks()} - {blocks}):
                raise UserError(
                    f"{min(others)}: holds parts done with another vocabulary or other settings; give the same as for "
                    "the parts, or delete this directory to do without them"
                )
            for other in set(self.directory.glob("blocks-*")) - {blocks}:
                shutil.rmtree(other)
        blocks.mkdir(exist_ok=True)
        return blocks

    def start_result(self) -> Path:
        """An empty directory for the final files."""
        shutil.rmtree(self._result, ignore_errors=True)
        self._result.mkdir()
        return self._result

    def publish(self) -> None:
        """Give the finished directory its name, in one step where nothing is replaced."""
        if self._replace:
            old = self.directory / "replaced"
            shutil.rmtree(old, ignore_errors=True)
            os.replace(self.out, old)
        os.replace(self._result, self.out)
        self._done = True


def _fingerprint(plan: dict[str, Any]) -> str:
    return sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]
