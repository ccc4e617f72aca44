"""Pretrained and official weights: their names, and the files that hold them."""
