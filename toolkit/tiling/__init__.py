"""Segment an image window by window at its own resolution, and blend the logits where windows overlap."""
