"""Reading and decoding images on nodes without a GPU, for workers whose GPU waits."""
