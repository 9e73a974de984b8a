"""LiFT: a small network that doubles the resolution (Suri et al., ECCV 2024)."""
