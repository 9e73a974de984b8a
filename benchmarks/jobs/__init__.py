"""Claims about whole jobs."""
