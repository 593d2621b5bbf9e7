"""Sweeps and comparisons: ``lorabatch bench`` and ``lorabatch compare``."""
