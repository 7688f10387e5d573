"""From a trained network to a proved ONNX file, and every way in which the proof must fail."""
