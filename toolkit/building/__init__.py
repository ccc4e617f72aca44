"""Graphs of every precision, each compared with PyTorch before it enters a bundle."""
