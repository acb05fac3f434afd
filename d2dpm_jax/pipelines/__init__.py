"""One file per `--mode`, and what they share."""
