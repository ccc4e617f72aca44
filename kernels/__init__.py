"""Custom CUDA kernels: none yet."""
