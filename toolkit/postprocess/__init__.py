"""Correct finished masks: which steps a bundle stores, how they are learnt, and how they are applied."""
