"""LitServe with its dynamic batching: `python -m pipeline.bench.served_by_litserve MODEL PORT`."""

from pathlib import Path
from typing import Any

import litserve
import numpy as np
from fastapi import UploadFile

from pipeline.bench.session import Session, arguments


class API(litserve.LitAPI):  # type: ignore[misc]
    """The hooks, in the order in which LitServe calls them."""

    def __init__(self, model: Path) -> None:
        super().__init__(max_batch_size=16, batch_timeout=0.005)
        self.model = model

    def setup(self, device: str) -> None:
        """Load the model, in the worker."""
        self.session = Session(self.model)

    def decode_request(self, request: UploadFile) -> Any:
        """Pixels (3, H, W)."""
        return self.session.decode(request.file)

    def batch(self, inputs: list[Any]) -> Any:
        """Pixels (N, 3, H, W)."""
        return np.stack(inputs)

    def predict(self, x: Any) -> Any:
        """Probabilities (N, K), or (K,) of an image that came alone."""
        return self.session.run(x)

    def unbatch(self, output: Any) -> list[Any]:
        """Probabilities (K,) of each."""
        return list(output)

    def encode_response(self, output: Any) -> dict[str, Any]:
        """The answer to one request."""
        return self.session.answer(output)


if __name__ == "__main__":
    model, port = arguments()
    server = litserve.LitServer(API(model), accelerator="cpu")
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="warning")
