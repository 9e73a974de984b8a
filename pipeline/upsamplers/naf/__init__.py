"""NAF: upsampling by attention to the cells around each pixel, with weights from the image alone."""
