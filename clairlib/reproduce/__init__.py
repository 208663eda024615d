"""Floor 5: notebooks run by papermill, sweeps with caches, and the claims they decide."""
