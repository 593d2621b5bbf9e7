"""Reports from run folders. Reads records and nothing else; never imports torch."""
