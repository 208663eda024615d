"""Floor 1: subspaces, ranks and low-rank matrices. Knows nothing of the statistics."""
