"""The job, one file a stage, in the order in which data flows through it."""
