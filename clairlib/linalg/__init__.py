"""Floor 1: subspaces, ranks and low-rank matrices. This package does not depend on the statistics."""
