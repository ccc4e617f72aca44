"""Bundles: the manifest, reading and sealing, signatures, and the files for Hugging Face."""
