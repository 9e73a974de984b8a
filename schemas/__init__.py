"""What is written down: job configuration, index and ledger tables, the store's attributes."""
