"""AnyUp: window attention from pixels to the features of any backbone (Wimmer et al., 2025)."""
