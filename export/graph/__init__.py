"""The ONNX graph: tracing, fusion, dialects, and what its nodes belong to and cost."""
