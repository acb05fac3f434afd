"""Quantized latent diffusion with dual denoising (D2-DPM) in JAX/Flax."""
