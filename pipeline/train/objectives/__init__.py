"""What is trained, and towards what: one file an upsampler."""
