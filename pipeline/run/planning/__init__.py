"""The plan of a job: made and checked, described, and measured on a few images."""
