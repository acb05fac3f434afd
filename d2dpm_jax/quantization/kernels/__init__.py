"""Kernels for NVIDIA GPUs: products of int8 that rescale before they write.

matmul, conv, norm: written in Pallas for its Triton backend.
hopper: products written in Pallas for Mosaic GPU, with TMA and WGMMA.
"""
