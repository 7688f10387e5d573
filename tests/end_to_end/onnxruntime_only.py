"""Classify the images of a test shard knowing the ONNX file alone: its input, its outputs, its metadata.

Run as a script: `onnxruntime_only.py MODEL SHARD...` prints the accuracy. Nothing of Shardline is imported, nor torch.
"""

import io
import json
import sys
import tarfile

import numpy as np
import onnxruntime
from PIL import Image

FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}


def pixels_of(encoded: bytes, preprocess: dict[str, object]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    resize = preprocess["resize"]
    assert isinstance(resize, list)  # [height, width]
    assert preprocess["crop"] is None
    resized = image.resize((resize[1], resize[0]), Image.Resampling(FILTERS[str(preprocess["interpolation"])]))
    return np.asarray(resized)  # (H, W, 3)


def main(model_path: str, *shards: str) -> None:
    session = onnxruntime.InferenceSession(model_path, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    preprocess = json.loads(metadata["shardline.preprocess"])
    images: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.uint8]]] = {}
    labels: dict[str, int] = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                if extension == "cls":
                    labels[key] = int(file.read())
                else:
                    images[key] = pixels_of(file.read(), preprocess)
    batch = np.stack([images[key] for key in labels]).transpose(0, 3, 1, 2)  # (N, 3, H, W)
    logits, probabilities = session.run(["logits", "probabilities"], {"image": batch})
    assert logits.shape == probabilities.shape == (len(labels), len(json.loads(metadata["shardline.class_names"])))
    correct = sum(int(row.argmax()) == label for row, label in zip(logits, labels.values(), strict=True))
    imported = {name.partition(".")[0] for name in sys.modules}
    assert not imported & {"torch", "pipeline", "lightning"}
    print(json.dumps({"num_samples": len(labels), "accuracy": correct / len(labels)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
