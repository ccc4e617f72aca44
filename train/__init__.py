"""Train TransUNet and LLM-TransUNet in PyTorch, and read the frozen LLaMA block."""
