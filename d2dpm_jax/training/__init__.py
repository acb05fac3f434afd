"""Training of the embedded MNIST models."""
