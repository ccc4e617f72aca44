"""Exact folding: the frozen block as fewer layers with the same output."""
