"""FeatUp's published constants (arXiv 2403.10516, section 3.2, and its code), shared by both of its methods.

The methods are joint bilateral upsampling (`pipeline.train.objectives`) and implicit networks
(`pipeline.upsamplers.implicit`). Their modules are separate: they differ in batching over images, in the source of
initial values and in the order of sums, and results must not change in the last bit.
"""

__all__ = ["ATTENTION_NOISE", "BLUR_SIGMA_PX", "BLUR_TAPS", "DEVIATION_INITIAL", "LEAST_DEVIATION"]

ATTENTION_NOISE = 0.01  # standard deviation of the attention downsampler's initial weights and biases
BLUR_TAPS, BLUR_SIGMA_PX = 5, 1.0  # of the Gaussian that blurs high-res features, or their views
DEVIATION_INITIAL = 0.1  # initial logarithm of the predicted deviation, and the factor on its initial weights
LEAST_DEVIATION = 1e-4
