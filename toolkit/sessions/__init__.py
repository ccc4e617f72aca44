"""The inference back-ends, one file each."""
