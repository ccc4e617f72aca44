"""Turn a trained model into an ONNX graph that is verified against it."""
