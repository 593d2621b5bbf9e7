"""Clocks, percentiles, ceilings and what the machine did meanwhile. Numbers carry their unit in their name."""
