"""Training an upsampler, one part a file: what is planned, prepared, minimised, measured, kept and written."""
