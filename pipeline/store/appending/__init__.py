"""Append rows to a finished store: claim them, then grow the last shard."""
