"""Places and objects: from a text to a file system, from a key to bytes, with retries."""
