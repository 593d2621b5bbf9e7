"""Training: schedule, evaluation, the loop, and the run that puts them together."""
