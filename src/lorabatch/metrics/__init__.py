"""What a run measured: names, units, statistics."""
