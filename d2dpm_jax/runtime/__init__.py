"""Files, devices, processes, signals, progress, metrics."""
