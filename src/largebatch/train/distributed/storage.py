"""Named tensors on disk: written by all ranks, each what it holds, and read back on any number of them."""

import io
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .ranks import world_size

if TYPE_CHECKING:
    from torch.distributed.checkpoint import CheckpointException, FileSystemReader

# All that torch pickles into the metadata of tensors.
_NAMES = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties"),
        *("ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "WindowsPath"),
}


def write_tensors(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write named tensors with `torch.distributed.checkpoint`: each rank what it holds, and nothing twice.

    All ranks of the run call it, with the same names. The folder must be one that they share.

    Raises:
        OSError: a rank cannot write.
    """
    from torch.distributed import checkpoint as dcp

    try:
        with _one_process_is_meant():
            dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder), no_dist=world_size() == 1)
    except dcp.CheckpointException as error:
        first = _first(error)
        raise (_os_error(first) or first) from error


def read_tensors(tensors: Mapping[str, Tensor], folder: Path, *, alone: bool = False) -> None:
    """Fill named tensors from a folder of `write_tensors`, whatever ranks and shards it was written by.

    Args:
        tensors: to fill, whole or cut over the ranks as they please; a name may be left out.
        folder: the folder.
        alone: whether this rank reads for itself; else all ranks of the run call it.

    Raises:
        OSError: a file is missing or damaged.
    """
    from torch.distributed import checkpoint as dcp

    try:
        with _one_process_is_meant():
            dcp.load(dict(tensors), storage_reader=_reader(folder), no_dist=alone or world_size() == 1)
    except dcp.CheckpointException as error:
        first = _first(error)
        what = f"{type(first).__name__}: {str(first).splitlines()[0] if str(first) else ''}"
        raise (_os_error(first) or OSError(what)) from error


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors in a folder of `write_tensors` as tensors on the meta device: names, shapes and dtypes."""
    from torch.distributed import checkpoint as dcp

    stored = _reader(folder).read_metadata().state_dict_metadata
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in stored.items()
        if isinstance(entry, dcp.TensorStorageMetadata)
    }


class _Unpickler(pickle.Unpickler):
    """Finds what the metadata of tensors is made of and no other code: a checkpoint may come from anywhere."""

    def find_class(self, module: str, name: str) -> Any:
        is_of_torch = module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        if is_of_torch or name in _NAMES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its metadata asks for {module}.{name}, which is no part of a checkpoint")


def _reader(folder: Path) -> "FileSystemReader":
    from torch.distributed.checkpoint import FileSystemReader

    class Reader(FileSystemReader):
        """As torch's, which would run whatever code the metadata names."""

        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            metadata = _Unpickler(io.BytesIO((folder / ".metadata").read_bytes())).load()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    return Reader(folder)


def _first(error: "CheckpointException") -> BaseException:
    """What went wrong on the first rank that tells, which torch wraps in a BaseException."""
    return next(iter(error.failures.values()))[0]


def _os_error(error: BaseException) -> OSError | None:
    """The system's error that another one hides, as torch's writer does a full disk's; None if there is none."""
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, OSError):
        inner = inner.__cause__ or inner.__context__
    if inner is None and "inline_container" in str(error):  # of another rank, from which its text alone comes
        return OSError(str(error).splitlines()[0])
    return inner


@contextmanager
def _one_process_is_meant() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield
