"""The networks and their variants."""
