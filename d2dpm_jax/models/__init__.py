"""The networks of latent diffusion, in Linen, with the names of LDM."""
