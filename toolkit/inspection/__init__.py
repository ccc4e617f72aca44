"""Describe a bundle, a checkpoint, an ONNX file or an engine."""
