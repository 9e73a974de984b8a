"""Progress while a job runs, and the report at its end. Imports no other subpackage of ``pipeline``."""
