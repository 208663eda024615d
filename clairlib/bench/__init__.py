"""Floor 5: time and memory, measured: what `clair bench` prints."""
