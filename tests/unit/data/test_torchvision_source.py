import gzip
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import DataError
from tests.unit.data.test_sources import opened


def make_cifar10(root: Path) -> None:
    """The files of CIFAR-10 as torchvision lays them out, with 2 images a batch."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for number, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        pixels = np.full((2, 3072), number, np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [number, 9]}))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))


def make_mnist(root: Path) -> None:
    """The files of MNIST as torchvision lays them out: 3 images to train, 2 to test."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, number in (("train", 3), ("t10k", 2)):
        pixels = np.arange(number, dtype=np.uint8).repeat(28 * 28).tobytes()
        header = np.array([0x803, number, 28, 28], ">i4").tobytes()
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + pixels)
        labels = np.array([0x801, number], ">i4").tobytes() + bytes(range(number))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))


def test_arrays_become_png_in_the_data_set_s_own_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    make_cifar10(tmp_path)
    source = opened(f"torchvision:CIFAR10:{tmp_path}")
    images = list(source.images())
    assert (source.kind, source.class_names[3]) == ("torchvision:CIFAR10", "cat")
    assert [(image.split, image.labels) for image in images[:3]] == [("train", (0,)), ("train", (9,)), ("train", (1,))]
    assert [(image.split, image.labels) for image in images[10:]] == [("test", (5,)), ("test", (9,))]
    with Image.open(io.BytesIO(source.read(images[4].name))) as image:
        assert (image.format, image.size, image.getpixel((3, 3))) == ("PNG", (32, 32), (2, 2, 2))


def test_grey_images_keep_one_channel(tmp_path: Path) -> None:
    make_mnist(tmp_path)
    source = opened(f"torchvision:MNIST:{tmp_path}")
    assert [(image.name, image.labels) for image in source.images()][3:] == [("test-00000000", (0,)), ("test-00000001", (1,))]
    with Image.open(io.BytesIO(source.read("train-00000002"))) as image:
        assert (image.mode, image.getpixel((0, 0))) == ("L", 2)


def test_images_that_are_files_keep_their_bytes(tmp_path: Path) -> None:
    source_folder = tmp_path / "eurosat" / "2750"
    for name in ("Forest", "River"):
        (source_folder / name).mkdir(parents=True)
        Image.new("RGB", (4, 4), "green").save(source_folder / name / f"{name}_1.jpg")
    source = opened(f"torchvision:EuroSAT:{tmp_path}")
    images = list(source.images())
    assert [(image.split, source.class_names[image.labels[0]]) for image in images] == [(None, "Forest"), (None, "River")]
    assert source.read(images[1].name) == (source_folder / "River" / "River_1.jpg").read_bytes()


def test_a_name_that_torchvision_does_not_have_is_refused_with_the_nearest() -> None:
    with pytest.raises(DataError, match=r"torchvision has no data set 'CIFAR11'\. Did you mean 'CIFAR10"):
        opened("torchvision:CIFAR11")


def test_a_data_set_that_cannot_be_downloaded_says_where_to_put_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", offline)
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(DataError, match=r"CIFAR10 is not in .* and cannot be downloaded \(network is unreachable\). Put its"):
        opened(f"torchvision:CIFAR10:{tmp_path}")


def test_a_data_set_without_one_class_an_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="torchvision:"):
        opened(f"torchvision:VOCDetection:{tmp_path}")
