"""Whether the language block helps, and what of it: a grid of controls, trained alike."""
