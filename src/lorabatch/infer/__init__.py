"""Continuous batching: requests, the scheduler that decides, the runner that computes, the sink
that records."""
