"""What features are worth on each task of jobs/evaluate.py."""
