"""Multiview upsampler: a linear solver fits features to many views of the image, given a model of the backbone."""
