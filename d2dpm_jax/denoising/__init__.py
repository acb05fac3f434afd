"""The joint Gaussian of (eps_q, error) per timestep, and what it corrects."""
