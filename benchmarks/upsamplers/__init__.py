"""Claims about upsamplers."""
