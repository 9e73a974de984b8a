"""What looks at windows of feature maps: `attention` within them, and `sum` over them."""
