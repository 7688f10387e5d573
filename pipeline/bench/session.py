"""What people write around an ONNX file when they serve it with FastAPI or LitServe: decode, run, say the label."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from PIL import Image

from pipeline.predictor import PREFIX


class Session:
    """An ONNX file on one thread: all servers have one core, where more threads only wait for each other."""

    def __init__(self, model: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        _, _, height, width = self.session.get_inputs()[0].shape
        self.size = width, height
        self.class_names = json.loads(self.session.get_modelmeta().custom_metadata_map[f"{PREFIX}class_names"])

    def decode(self, file: Any) -> npt.NDArray[np.uint8]:
        """Pixels, (3, H, W), of an image file."""
        image = Image.open(file).convert("RGB").resize(self.size, Image.Resampling.BILINEAR)
        return np.asarray(image).transpose(2, 0, 1)

    def run(self, batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Probabilities, (N, K), of pixels (N, 3, H, W)."""
        (probabilities,) = self.session.run(["probabilities"], {"image": batch})
        return np.asarray(probabilities)

    def answer(self, probabilities: npt.NDArray[np.float32]) -> dict[str, Any]:
        """The five most probable classes, given (K,)."""
        best = probabilities.argsort()[::-1][:5]
        return {"top_k": [{"label": self.class_names[place], "probability": float(probabilities[place])} for place in best]}


def arguments() -> tuple[Path, int]:
    """Model and port, as the command line of a contender names them."""
    model, port = sys.argv[1:]
    return Path(model), int(port)
