"""From pixels to C channels of a timm backbone, and from those to k principal components."""
