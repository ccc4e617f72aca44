"""TensorRT engines of a bundle: building, choosing, what is known of each."""
