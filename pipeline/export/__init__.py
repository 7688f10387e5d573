"""The export stage: a trained network becomes one ONNX file, published only when it gives the trained answers."""
