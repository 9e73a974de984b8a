"""From the bytes of an image to pixels, placed on the grid of the features. Imports no other room of images."""
