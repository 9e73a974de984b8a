"""The rows of a store: their index, the ledger of what became of them, and their stored values."""
