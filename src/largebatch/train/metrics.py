"""The run directory: what a run writes while it goes, and all that a report reads."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from largebatch.errors import UserError

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]


class RunDirectory:
    """`config.json`, `env.json`, `metrics.jsonl`, `summary.json` and `checkpoints/` in one folder.

    Args:
        path: the folder.
        write: False on ranks that only compute; every method then does nothing.

    Raises:
        UserError: the folder cannot be made, or not be written to.
    """

    def __init__(self, path: Path, *, write: bool = True) -> None:
        self.path = path
        self.write = write
        self.checkpoints = path / "checkpoints"
        self._sink: Any = None
        self._lock: Any = None
        if write:
            check_folder(path)
            path.mkdir(parents=True, exist_ok=True)

    def lock(self) -> bool:
        """Take the folder for this process until `close`; False where another has it.

        True wherever nobody can tell, as on file systems without locks. The file `.lock` stays, and means nothing.
        """
        if self.write and fcntl is not None:
            self._lock = open(self.path / ".lock", "w")  # noqa: SIM115
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:
                pass
        return True

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file, whole or not at all."""
        if self.write:
            write_json(self.path / name, content)

    def log(self, event: str, **values: Any) -> None:
        """Append one line to `metrics.jsonl`, and to TensorBoard where it is on."""
        if not self.write:
            return
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"event": event, **values}) + "\n")
        if self._sink is not None:
            _to_tensorboard(self._sink, event, values)

    def rewind(self, step: int) -> None:
        """Drop the metrics after `step`, which a resumed run is going to write again, and a line cut short."""
        path = self.path / "metrics.jsonl"
        if not self.write or not path.exists():
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if event.get("step", 0) <= step:
                kept.append(line + "\n")
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept))
        os.replace(partial, path)

    def use_tensorboard(self, step: int = 0) -> None:
        """Send every number to TensorBoard as well, in the folder `tensorboard`.

        Args:
            step: TensorBoard is to forget what it was told after it.

        Raises:
            UserError: tensorboard is not installed.
        """
        if not self.write:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("TensorBoard is not installed; pip install 'largebatch[tensorboard]'") from None
        self._sink = SummaryWriter(str(self.path / "tensorboard"), purge_step=step + 1)

    def close(self) -> None:
        for opened in (self._sink, self._lock):
            if opened is not None:
                opened.close()


def check_folder(path: Path) -> None:
    """Refuse a folder for results that cannot be made or written to; nothing is made yet.

    Raises:
        UserError: that is so.
    """
    nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not nearest.is_dir():
        raise UserError(f"{path} cannot be made: {nearest} is no folder; name another folder with --out")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written: there is no permission for {nearest}; name another with --out")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` beside `path` and rename it there."""
    partial = path.with_name(f".partial-{path.name}")
    try:
        partial.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: there is no such file, it cannot be read, or it is not a JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; is {path.parent} a run directory?") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); is {path.parent} a run directory?") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; is {path.parent} a run directory?")
    return content


def _to_tensorboard(sink: Any, event: str, values: Mapping[str, Any]) -> None:
    step = values.get("step")
    nested = values.get("ratios", {}) if event == "trust_ratios" else values
    for name, value in nested.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step":
            sink.add_scalar(f"{event}/{name}", value, step)
