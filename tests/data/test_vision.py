"""IDX files are read as what they are, and a damaged one is refused with what is wrong and where.

Guards the vision workload's input: a file cut short or mixed up must never become images.
"""

import gzip
import struct
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from largebatch.data.vision import FASHION_MNIST_PIXELS, ImageDataset, load_idx_dataset, read_idx
from largebatch.errors import UserError

SAMPLE = Path(str(resources.files("largebatch"))) / "assets" / "mnist_sample"
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images of 28 x 28, their labels, not gzipped."""
    pixels = np.arange(5 * 28 * 28).reshape(5, 28, 28) % 256
    (tmp_path / IMAGES).write_bytes(idx(pixels))
    (tmp_path / LABELS).write_bytes(idx(np.array([3, 1, 4, 1, 5])))
    return tmp_path


def test_pixels_and_labels_are_those_in_the_file(folder: Path) -> None:
    data = load_idx_dataset(folder, "train")
    assert len(data) == 5
    assert data.images.shape == (5, 1, 28, 28)
    assert data.images.dtype == torch.float32
    assert data.labels.tolist() == [3, 1, 4, 1, 5]
    assert data.labels.dtype == torch.int64
    pixels = (data.images * 0.3081 + 0.1307) * 255
    expected = (torch.arange(5 * 28 * 28) % 256).view(5, 1, 28, 28)
    # 255 * 3e-7, the rounding of values up to 2.8
    torch.testing.assert_close(pixels, expected.float(), rtol=0, atol=1e-4)


def test_its_identity_is_that_of_images_labels_and_order(folder: Path) -> None:
    data = load_idx_dataset(folder, "train")
    assert load_idx_dataset(folder, "train").identity == data.identity
    turned = data.images[[1, 0, 2, 3, 4]]
    others = [(data.images, data.labels.flip(0)), (turned, data.labels), (data.images[:4], data.labels[:4])]
    assert len({data.identity, *(ImageDataset(*each).identity for each in others)}) == 4


def test_normalisation_is_the_callers(folder: Path) -> None:
    mean, std = FASHION_MNIST_PIXELS
    plain = load_idx_dataset(folder, "train", mean=0.0, std=1.0).images
    fashion = load_idx_dataset(folder, "train", mean=mean, std=std).images
    assert (plain.min(), plain.max()) == (0, 1)
    torch.testing.assert_close(fashion, (plain - 0.2860) / 0.3530)


def test_gzipped_is_the_same(folder: Path) -> None:
    plain = load_idx_dataset(folder, "train")
    for name in (IMAGES, LABELS):
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
        (folder / name).unlink()
    packed = load_idx_dataset(folder, "train")
    assert torch.equal(plain.images, packed.images)
    assert torch.equal(plain.labels, packed.labels)


@pytest.mark.parametrize(
    ("split", "counts"),
    [
        ("train", [191, 220, 198, 191, 214, 180, 200, 224, 172, 210]),
        ("test", [85, 126, 116, 107, 110, 87, 87, 99, 89, 94]),
    ],
)
def test_shipped_sample(split: str, counts: list[int]) -> None:
    """The digits' counts; pixels as MNIST's: mean 0, deviation 1 but for the luck of a few hundred thousand strokes."""
    data = load_idx_dataset(SAMPLE, split)
    assert data.labels.bincount().tolist() == counts
    assert data.images.shape == (sum(counts), 1, 28, 28)
    assert abs(data.images.mean()) < 0.05
    assert abs(data.images.std() - 1) < 0.05


def test_shipped_sample_is_the_beginning_of_mnist(shared_data: Path) -> None:
    for split, size in (("train", 60_000), ("test", 10_000)):
        whole, sample = load_idx_dataset(shared_data / "mnist", split), load_idx_dataset(SAMPLE, split)
        assert len(whole) == size
        assert torch.equal(whole.images[: len(sample)], sample.images)
        assert torch.equal(whole.labels[: len(sample)], sample.labels)
        if split == "train":  # the constants are this set's, to four digits
            assert abs(whole.images.mean()) < 2e-4
            assert abs(whole.images.std() - 1) < 2e-4


def damaged(content: bytes, how: str) -> bytes:
    return {
        "empty": b"",
        "within the header": content[:9],
        "one byte short": content[:-1],
        "one byte more": content + b"\0",
        "other magic": b"PK\3\4" + content[4:],
        "other type": content[:2] + b"\x0d" + content[3:],
        "other dimensions": content[:3] + b"\2" + content[4:],
        "huge": content[:4] + b"\xff" * 12 + content[16:],
    }[how]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("empty", "begins with nothing, not with 00000803"),
        ("within the header", "cut short within its header, at 9 of 16 bytes"),
        ("one byte short", r"cut short: its header promises 3920 bytes of data \(5x28x28\), there are 3919"),
        ("one byte more", "too long: its header promises 3920 bytes"),
        ("other magic", "begins with 504b0304"),
        ("other type", "no IDX file of unsigned bytes in 3 dimensions"),
        ("other dimensions", "begins with 00000802"),
        ("huge", "cut short: its header promises"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_damaged_files_are_refused(how: str, message: str, packed: bool, folder: Path) -> None:
    content = damaged((folder / IMAGES).read_bytes(), how)
    (folder / IMAGES).unlink()
    path = folder / (IMAGES + ".gz" * packed)
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(UserError, match=f"^{path}: .*{message}"):
        load_idx_dataset(folder, "train")


@pytest.mark.parametrize("damage", ["cut short", "no gzip", "a byte flipped"])
def test_damaged_gzip_is_refused(damage: str, folder: Path) -> None:
    content = bytearray(gzip.compress((folder / IMAGES).read_bytes()))
    (folder / IMAGES).unlink()
    if damage == "cut short":
        content = content[:-20]
    elif damage == "no gzip":
        content = bytearray(b"<html>Not found</html>")
    else:
        content[len(content) // 2] ^= 0xFF
    (folder / f"{IMAGES}.gz").write_bytes(content)
    with pytest.raises(UserError, match=rf"{IMAGES}\.gz: not a whole gzip file .*fetch it again"):
        load_idx_dataset(folder, "train")


def test_files_that_do_not_belong_together_are_refused(folder: Path) -> None:
    (folder / LABELS).write_bytes(idx(np.array([3, 1, 4, 1])))
    with pytest.raises(UserError, match=f"{LABELS}: 4 labels for the 5 images of {IMAGES}"):
        load_idx_dataset(folder, "train")
    (folder / LABELS).write_bytes(idx(np.array([3, 1, 4, 1, 10])))
    with pytest.raises(UserError, match="holds the label 10; labels are 0 to 9"):
        load_idx_dataset(folder, "train")
    (folder / LABELS).write_bytes((folder / IMAGES).read_bytes())
    with pytest.raises(UserError, match=r"no IDX file of unsigned bytes in 1 dimension$"):
        load_idx_dataset(folder, "train")
    (folder / IMAGES).write_bytes(idx(np.zeros((0, 28, 28))))
    (folder / LABELS).write_bytes(idx(np.zeros(0)))
    with pytest.raises(UserError, match="holds no images"):
        load_idx_dataset(folder, "train")


def test_what_is_missing_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte: no such file, nor t10k-images-idx3-ubyte\.gz"):
        load_idx_dataset(folder, "test")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        load_idx_dataset(folder / "nowhere", "train")
    with pytest.raises(UserError, match="unknown split 'validation'; known are train, test"):
        load_idx_dataset(folder, "validation")
    with pytest.raises(UserError, match="x: no such file"):
        read_idx(folder / "x", num_dimensions=1)
