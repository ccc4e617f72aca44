"""One module per image format: it reads images and masks, and writes masks."""
