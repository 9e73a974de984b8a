"""FeatUp's published numbers (arXiv 2403.10516, section 3.2, and its code) that both of its trainings share.

Both: of joint bilateral upsampling (`pipeline.train.objectives`) and of implicit networks
(`pipeline.upsamplers.implicit`). The networks themselves stay two: they differ in their number, in the source of their
initial values and in the order of sums, and results must not change in the last bit.
"""

__all__ = ["ATTENTION_NOISE", "BLUR_SIGMA_PX", "BLUR_TAPS", "DEVIATION_INITIAL", "LEAST_DEVIATION"]

ATTENTION_NOISE = 0.01  # deviation of the initial weights and biases of the attention downsampler
BLUR_TAPS, BLUR_SIGMA_PX = 5, 1.0  # of the Gaussian that high-res features are compared with, or views blurred by
DEVIATION_INITIAL = 0.1  # initial logarithm of the deviation to expect, and the factor on its initial weights
LEAST_DEVIATION = 1e-4
