from pathlib import Path

import pytest
import torch
from torchvision.io import decode_jpeg, read_file

from pipeline.bench import copies
from pipeline.bench.images import make_images
from pipeline.data import native


@pytest.mark.skipif(not native.is_built(), reason="the native decoder is not built")
def test_marked_files_have_the_pixels_of_the_others(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "images", 12)
    marked = copies.mark(folder, tmp_path / "marked")
    names = sorted(path.relative_to(folder) for path in folder.rglob("*.jpg"))
    assert names == sorted(path.relative_to(marked) for path in marked.rglob("*.jpg"))
    for name in names:
        assert b"\xff\xdd\x00\x04\x00\x04" in (marked / name).read_bytes(), "a restart interval of 4 MCUs"
        assert torch.equal(decode_jpeg(read_file(str(folder / name))), decode_jpeg(read_file(str(marked / name))))


def test_a_copy_that_was_broken_off_is_made_anew(tmp_path: Path) -> None:
    made = []

    def write(part: str) -> None:
        made.append(part)
        Path(part).mkdir()
        (Path(part) / "half").write_bytes(b"12345")
        if len(made) == 1:
            raise OSError("disk full")

    target = tmp_path / "copies/mds"
    for _ in range(3):
        try:
            copies._once(target, write)
        except OSError:
            assert not target.exists()
    assert len(made) == 2 and copies.bytes_of(target) == 5
