"""Encode features, write and commit shards, and verify and repair stores."""
