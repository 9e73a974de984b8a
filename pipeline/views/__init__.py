"""Views of images, and downsamplers to compare features with them: for training, multiview and implicit."""
