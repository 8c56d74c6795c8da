"""Image sets: MNIST's IDX format, which Fashion-MNIST shares."""

import gzip
import hashlib
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from largebatch.errors import UserError

# (mean, standard deviation) of the training pixels in [0, 1]
MNIST_PIXELS = (0.1307, 0.3081)
FASHION_MNIST_PIXELS = (0.2860, 0.3530)

_FILE_PREFIXES = {"train": "train", "test": "t10k"}
_UNSIGNED_BYTES = 0x08


@dataclass(frozen=True)
class ImageDataset:
    """Images and their classes, all in memory.

    Args:
        images: [N, C, H, W] float32, normalised.
        labels: [N] int64.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def identity(self) -> str:
        """A hash of the images, their classes and their order."""
        digest = hashlib.sha256(self.labels.numpy())
        digest.update(self.images.numpy())
        return digest.hexdigest()


def load_idx_dataset(
    directory: str | Path, split: str, *, mean: float = MNIST_PIXELS[0], std: float = MNIST_PIXELS[1]
) -> ImageDataset:
    """Read a split of MNIST or Fashion-MNIST from its canonical files, gzipped or not.

    Args:
        directory: the folder with ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the two that begin with
            ``t10k``, each with or without ``.gz``.
        split: "train" or "test".
        mean, std: of the pixels in [0, 1]; images become (pixel / 255 - mean) / std. The defaults are MNIST's; pass
            ``FASHION_MNIST_PIXELS`` for the other.

    Returns:
        Images [N, 1, H, W] and labels [N].

    Raises:
        UserError: if a file is missing, damaged, of another kind, or the two do not belong together.
    """
    if split not in _FILE_PREFIXES:
        raise UserError(f"unknown split {split!r}; known are {', '.join(_FILE_PREFIXES)}")
    if not Path(directory).is_dir():
        raise UserError(f"{directory}: no such folder; it should hold the four MNIST files")
    prefix = _FILE_PREFIXES[split]
    images_path = _find(Path(directory), f"{prefix}-images-idx3-ubyte")
    labels_path = _find(Path(directory), f"{prefix}-labels-idx1-ubyte")
    pixels = read_idx(images_path, num_dimensions=3)
    labels = read_idx(labels_path, num_dimensions=1)
    if len(pixels) != len(labels):
        raise UserError(f"{labels_path}: {len(labels)} labels for the {len(pixels)} images of {images_path.name}")
    if not len(labels):
        raise UserError(f"{images_path}: holds no images")
    if labels.max() > 9:
        raise UserError(f"{labels_path}: holds the label {labels.max()}; labels are 0 to 9")
    images = torch.from_numpy(pixels.astype(np.float32)).div_(255).sub_(mean).div_(std)
    return ImageDataset(images=images.unsqueeze(1), labels=torch.from_numpy(labels.astype(np.int64)))


def read_idx(path: str | Path, *, num_dimensions: int) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes, gzipped if its name ends in ``.gz``.

    The format: two zero bytes, the type (8: unsigned bytes), the number of dimensions, each dimension as a big-endian
    32-bit number, then the data in row-major order.

    Args:
        path: the file.
        num_dimensions: how many it must have: 3 for images, 1 for labels.

    Raises:
        UserError: if the file is missing, not gzip, of another kind, cut short, or too long.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file ({error}); fetch it again") from None
    header_size = 4 + 4 * num_dimensions
    magic = bytes((0, 0, _UNSIGNED_BYTES, num_dimensions))
    if content[:4] != magic:
        raise UserError(
            f"{path}: begins with {content[:4].hex() or 'nothing'}, not with {magic.hex()}: no IDX file of unsigned "
            f"bytes in {num_dimensions} dimension{'s' if num_dimensions > 1 else ''}"
        )
    if len(content) < header_size:
        raise UserError(
            f"{path}: cut short within its header, at {len(content)} of {header_size} bytes; fetch it again"
        )
    shape = np.frombuffer(content, dtype=">u4", count=num_dimensions, offset=4).tolist()
    size, promised = len(content) - header_size, prod(shape)
    if size != promised:
        fault = "cut short" if size < promised else "too long"
        raise UserError(
            f"{path}: {fault}: its header promises {promised} bytes of data ({'x'.join(map(str, shape))}), there are "
            f"{size}; fetch it again"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header_size).reshape(shape)


def _find(directory: Path, name: str) -> Path:
    for path in (directory / name, directory / f"{name}.gz"):
        if path.is_file():
            return path
    raise UserError(f"{directory / name}: no such file, nor {name}.gz; the four MNIST files must lie in this folder")
