"""Segment many images: prefetching, a pipeline over images, a folder of masks that can be resumed."""
