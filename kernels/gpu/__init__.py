"""Parts that Triton kernels share.

* `requirements`: what a GPU, Triton and the inputs must be
* `cache`: the folder for compiled kernels
* `matrices`: products on matrix units
* `codes`: quantization

It does not depend on any kernel.
"""
