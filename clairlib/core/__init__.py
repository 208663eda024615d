"""Floor 0: seeds, provenance, files and processes. This package does not depend on the method."""
