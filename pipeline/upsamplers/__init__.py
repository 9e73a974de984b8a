"""From features at h × w to features at H × W.

An upsampler is a file, or a folder with its network; `pipeline.upsamplers.build` names them all. May import
``pipeline.views`` and ``pipeline.features``, and the kernels.
"""
