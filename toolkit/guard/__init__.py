"""Say when an image is unlike the images that a network was trained on; masks are never changed."""
