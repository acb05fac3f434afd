"""Noise schedules, DDIM coefficients and the sampler as one `lax.scan`."""
