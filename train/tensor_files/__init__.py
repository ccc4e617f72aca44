"""Read tensors from untrusted files: safetensors, pickles that contain only tensors, and JSON beside them."""
