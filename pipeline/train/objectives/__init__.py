"""Training objectives, one file per upsampler."""
