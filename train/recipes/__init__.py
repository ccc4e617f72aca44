"""Recipes: what is trained, on which data, with which settings."""
