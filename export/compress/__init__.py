"""Cheaper replacements of the frozen block, fitted in closed form to what it does in one trained network."""
