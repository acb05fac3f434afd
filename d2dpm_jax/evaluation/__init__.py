"""What samples are judged by: feature networks, distances, image sets."""
