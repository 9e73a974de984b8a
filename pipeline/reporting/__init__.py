"""Progress while a job runs, and the report at its end."""
