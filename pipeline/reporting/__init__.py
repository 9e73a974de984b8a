"""What a job says while it runs and at its end. Imports no other room."""
