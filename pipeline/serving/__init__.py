"""The serving stage: answers from an ONNX file alone, without torch."""
