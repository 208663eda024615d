"""Floor 5: benchmarks of time and memory, which `clair bench` prints."""
