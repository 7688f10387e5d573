"""A crop costs no more than a bare decode of the whole image: the promise of the decoder in C, as a ratio with a wide bound."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.io import ImageReadMode, decode_jpeg

from pipeline.bench.images import make_images
from pipeline.data.native import DECODED, SAMPLE, CropReader, is_built

NUM_IMAGES = 48
ROUNDS = 7
# About 0.7 beside a bare libjpeg-turbo decode, 0.9 where libjpeg reads the Huffman codes.
WIDEST_RATIO = 1.0


@pytest.mark.skipif(not is_built(), reason="the native decoder is not built")
def test_a_crop_costs_less_than_a_bare_decode(tmp_path: Path) -> None:
    paths = sorted(make_images(tmp_path, NUM_IMAGES).rglob("*.jpg"))
    contents = [torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8) for path in paths]
    samples = np.zeros(NUM_IMAGES, SAMPLE)
    samples["file"] = [os.open(path, os.O_RDONLY) for path in paths]
    samples["size"] = [len(content) for content in contents]
    samples["row"] = np.arange(NUM_IMAGES)
    samples["key"] = np.arange(NUM_IMAGES, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    reader, out = CropReader(0.08, 0.5, (224, 224)), np.empty((NUM_IMAGES, 224, 224, 3), np.uint8)

    def crop() -> None:
        assert (reader.read(samples, out) == DECODED).all()

    def decode() -> None:
        for content in contents:
            decode_jpeg(content, mode=ImageReadMode.RGB)

    try:
        ratio = least_seconds(crop, decode)
    finally:
        for file in samples["file"]:
            os.close(file)
    print(f"a crop takes {ratio[0] / ratio[1]:.2f} of a bare decode")
    assert ratio[0] / ratio[1] < WIDEST_RATIO


def least_seconds(*works: Callable[[], None]) -> list[float]:
    """CPU seconds of each, the least of rounds in which they take turns: a busy machine only ever adds."""
    taken: list[list[float]] = [[] for _ in works]
    for _ in range(ROUNDS):
        for work, seconds in zip(works, taken, strict=True):
            begun = time.thread_time()
            work()
            seconds.append(time.thread_time() - begun)
    return [min(seconds) for seconds in taken]
