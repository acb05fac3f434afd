"""Weights from elsewhere, read into our parameter trees."""
