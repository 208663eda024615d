"""Floor 0: seeds, provenance, files, processes. Knows nothing of the method."""
