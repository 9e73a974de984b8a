"""Operations on windows of feature maps: `attention` within them, and weighted `sum` over them."""
