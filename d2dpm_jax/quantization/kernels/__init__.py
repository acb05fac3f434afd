"""Kernels for NVIDIA Hopper, for layers on integers and what is between them.

products: linear layers and convolutions of int8, with what follows them; made
  of `hopper`, in Pallas for Mosaic GPU, with TMA and WGMMA.
norm: norms that quantize, in Pallas for its Triton backend.
"""
