"""FeatUp's implicit upsampler: a network fitted to each image (Fu et al., ICLR 2024)."""
