"""FastAPI with onnxruntime: `python -m pipeline.bench.served_by_fastapi MODEL PORT`.

The route is a function that is not async, so FastAPI runs it in its pool of threads.
"""

from typing import Any

import uvicorn
from fastapi import FastAPI, UploadFile

from pipeline.bench.session import Session, arguments


def build_app(session: Session) -> FastAPI:
    """One route that takes a form's file."""
    app = FastAPI()

    @app.post("/predict")
    def predict(file: UploadFile) -> dict[str, Any]:
        (probabilities,) = session.run(session.decode(file.file)[None])
        return session.answer(probabilities)

    return app


if __name__ == "__main__":
    model, port = arguments()
    uvicorn.run(build_app(Session(model)), host="127.0.0.1", port=port, log_level="warning")
