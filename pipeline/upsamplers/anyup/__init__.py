"""AnyUp: window attention from pixels to features of any backbone (Wimmer et al., 2025)."""
