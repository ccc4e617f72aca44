"""Real images that anyone can fetch, with masks."""
