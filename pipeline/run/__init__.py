"""Plan jobs and run them: plans, workers, the task queue."""
