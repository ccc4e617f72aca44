"""The frozen block: choosing layers, and reading them from every file format."""
