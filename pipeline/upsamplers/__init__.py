"""Upsamplers: from features at h × w to features at H × W.

Each upsampler is a file, or a folder with its network; `pipeline.upsamplers.build` lists them.
"""
