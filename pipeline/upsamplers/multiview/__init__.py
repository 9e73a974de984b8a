"""Features that agree with many views of the image, by a linear solver; and the model of a backbone that it needs."""
