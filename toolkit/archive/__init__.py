"""Segment whole archives: trees of folders, archive files, lists, DICOM by its UIDs, and parts of them."""
