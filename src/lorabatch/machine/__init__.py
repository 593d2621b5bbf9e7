"""The machine a run is on: what it has, what it may use, what it did, how fast it can be."""
