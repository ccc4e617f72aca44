"""TensorRT: building an engine, its graph, its log, and the layers that are expected in it."""
