"""Answers from an ONNX file alone, and the files that must be refused."""
