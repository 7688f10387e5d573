"""`mlflow models serve`, which takes tensors as JSON: `python -m pipeline.bench.served_by_mlflow MODEL PORT`."""

import shutil
import subprocess
import sys

import mlflow.onnx
import onnx

from pipeline.bench.session import arguments
from pipeline.tracking.registry import signature_of

if __name__ == "__main__":
    model, port = arguments()
    folder = model.with_suffix(".mlflow")
    shutil.rmtree(folder, ignore_errors=True)
    mlflow.onnx.save_model(
        onnx.load(model),
        str(folder),
        signature=signature_of(model),
        onnx_execution_providers=["CPUExecutionProvider"],
        onnx_session_options={"intra_op_num_threads": 1},
        pip_requirements=["onnxruntime"],
        save_as_external_data=False,
    )
    serve = ["-m", "mlflow", "models", "serve", "-m", str(folder), "-p", str(port), "--env-manager", "local"]
    subprocess.run([sys.executable, *serve], check=True)
