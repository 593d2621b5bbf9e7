"""Jobs on a cluster: checks before them, submission, work shared between tasks. Never imports
torch."""
