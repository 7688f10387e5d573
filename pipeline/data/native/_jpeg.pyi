from typing import Any

def crop(
    jpeg: bytes, box: tuple[int, int, int, int], mirrored: bool, max_pixels: int, height: int, width: int, out: Any
) -> int: ...
def random_crop(
    jpeg: bytes, key: int, smallest: float, flip: float, max_pixels: int, height: int, width: int, out: Any
) -> int: ...
def read_crops(
    files: Any,
    offsets: Any,
    sizes: Any,
    keys: Any,
    smallest: float,
    flip: float,
    max_pixels: int,
    height: int,
    width: int,
    out: Any,
    statuses: Any,
) -> None: ...
def random_box(key: int, height: int, width: int, smallest: float) -> tuple[int, int, int, int]: ...
def with_restarts(jpeg: bytes, interval: int) -> bytes: ...
def use_avx2(wanted: bool) -> bool: ...
