import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.config import DatasetConfig
from pipeline.data.encode import Encoder
from pipeline.data.listing import PlacedImage
from pipeline.data.pack import Packer, ShardJob, key_part
from pipeline.data.parallel import SharedCounter
from pipeline.data.partial import Partial
from pipeline.data.plan import ShardPlan
from pipeline.errors import DataError
from pipeline.files import sha256_of
from pipeline.manifest import Task
from tests.unit.data.given import Given, GivenImages, picture

SHARD = ShardPlan(2, "train-000002.tar", "train", 20, 20, 3)


def pack(
    images: list[Given],
    folder: Path,
    shard: ShardPlan = SHARD,
    task: Task = "single",
    stats_every: int = 1,
    trust: bool = False,
) -> dict[str, Any]:
    """Write a shard of `images` and return its sidecar."""
    placed = [
        PlacedImage(image.name, image.labels, len(image.encoded) if isinstance(image.encoded, bytes) else 0) for image in images
    ]
    counted: list[int] = []
    encoder = Encoder(DatasetConfig(), trust=trust)
    packer = Packer(GivenImages(images), encoder, Partial(folder), task, stats_every, SharedCounter(counted.append))
    packer.partial.root.mkdir(exist_ok=True)
    packer.write(ShardJob(shard, placed))
    packer.counter.look()
    assert counted[-1] == len(images)
    sidecar = packer.partial.read_sidecar(shard.name)
    assert sidecar is not None
    return sidecar


def members_of(folder: Path) -> dict[str, bytes]:
    with tarfile.open(folder / ".partial/shards" / SHARD.name) as tar:
        return {member.name: file.read() for member in tar if (file := tar.extractfile(member))}


IMAGES = [Given("cat/ü 1.jpg", (3,)), Given("dog/2.jpg", (0,)), Given("cat/3.jpg", (3,))]


def test_a_sample_is_its_image_and_its_label_under_a_key_that_tells_number_and_file(tmp_path: Path) -> None:
    pack(IMAGES, tmp_path)
    assert members_of(tmp_path) == {
        "00000020-_1.jpg": picture("cat/ü 1.jpg"),
        "00000020-_1.cls": b"3",
        "00000021-2.jpg": picture("dog/2.jpg"),
        "00000021-2.cls": b"0",
        "00000022-3.jpg": picture("cat/3.jpg"),
        "00000022-3.cls": b"3",
    }


def test_the_sidecar_says_where_every_image_lies_and_what_the_shard_is(tmp_path: Path) -> None:
    sidecar = pack(IMAGES, tmp_path)
    path = tmp_path / ".partial/shards" / SHARD.name
    content = path.read_bytes()
    assert [content[offset : offset + size] for offset, size, _ in sidecar["rows"]] == [image.encoded for image in IMAGES]
    assert [label for _, _, label in sidecar["rows"]] == [3, 0, 3]
    assert (sidecar["sha256"], sidecar["num_bytes"]) == (sha256_of(path), len(content))
    assert sidecar["rejected"] == []


def test_several_labels_are_stored_beside_the_first_and_none_as_minus_one(tmp_path: Path) -> None:
    sidecar = pack([Given("a.jpg", (2, 0)), Given("b.jpg", ())], tmp_path, task="multi")
    members = members_of(tmp_path)
    assert [members["00000020-a.cls"], members["00000021-b.cls"]] == [b"2", b"-1"]
    assert [json.loads(members[name]) for name in ("00000020-a.json", "00000021-b.json")] == [
        {"labels": [2, 0]},
        {"labels": []},
    ]
    assert [labels for _, _, *labels in sidecar["rows"]] == [[2, 0], []]


def test_what_cannot_be_decoded_or_read_is_left_out_and_noted(tmp_path: Path) -> None:
    bad = [Given("x.jpg", (0,), None, b"\xff\xd8garbage"), Given("y.jpg", (0,), None, PermissionError(13, "Permission denied"))]
    sidecar = pack([IMAGES[0], *bad, IMAGES[1]], tmp_path)
    assert [name for name, _ in sidecar["rejected"]] == ["x.jpg", "y.jpg"]
    assert "cannot identify" in sidecar["rejected"][0][1]
    assert sidecar["rejected"][1][1] == "Permission denied"
    # The numbers of the others stay as they are, whatever is rejected.
    assert [name for name in members_of(tmp_path) if name.endswith(".cls")] == ["00000020-_1.cls", "00000023-2.cls"]


def test_only_training_images_count_for_the_statistics(tmp_path: Path) -> None:
    assert pack(IMAGES, tmp_path)["pixels"]["count"] == 3 * 64
    assert pack(IMAGES, tmp_path, ShardPlan(0, SHARD.name, "val", 0, 0, 3))["pixels"]["count"] == 0


@pytest.mark.parametrize(("first", "num_images"), [(20, 2), (21, 1)])  # numbers 20 and 22, or 22
def test_with_trust_every_so_many_training_images_count(first: int, num_images: int, tmp_path: Path) -> None:
    shard = ShardPlan(0, SHARD.name, "train", first, first, 3)
    assert pack(IMAGES, tmp_path, shard, stats_every=2, trust=True)["pixels"]["count"] == num_images * 64


def test_pixels_are_summed_as_a_reader_will_see_them(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(buffer, "PNG")  # becomes white
    pixels = pack([Given("a.png", (0,), None, buffer.getvalue())], tmp_path)["pixels"]
    assert pixels == {"count": 16, "sums": [16 * 255] * 3, "squares": [16 * 255 * 255] * 3}


def test_an_image_that_changed_since_it_was_hashed_ends_the_work_by_name(tmp_path: Path) -> None:
    partial = Partial(tmp_path)
    partial.root.mkdir()
    packer = Packer(GivenImages(IMAGES), Encoder(DatasetConfig()), partial, "single", 1, SharedCounter(lambda _: None))
    with pytest.raises(DataError, match=r"dog/2\.jpg: changed while it was being written"):
        packer.write(ShardJob(SHARD, [PlacedImage("dog/2.jpg", (0,), 5)]))
    assert list(partial.shards_dir.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b/photo.v2 (1).jpg", "photo_v2_1_"),
        ("猫.png", "_"),
        ("caf\udce9.png", "caf_"),
        (".hidden", ".hidden".replace(".", "_")),
        ("x" * 90 + ".jpg", "x" * 60),
        ("digit-0001", "digit-0001"),
    ],
)
def test_a_key_has_only_letters_that_every_reader_stands(name: str, expected: str) -> None:
    assert key_part(name) == expected
