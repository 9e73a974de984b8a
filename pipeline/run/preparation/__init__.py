"""Before the first shard: the sample, the fits to it, the quantization steps, and the store's setup."""
