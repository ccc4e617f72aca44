"""Measure a bundle: its masks, its speed and where its time goes; and compare two measurements."""
