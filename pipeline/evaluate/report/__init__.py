"""The result of an evaluation as a table, as JSON, and as a page with pictures."""
