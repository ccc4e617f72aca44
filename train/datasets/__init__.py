"""Data sets for training and evaluation, one file each."""
