"""Floor 3: CLAIR itself. The class is `clairlib.CLAIR`; each file is named after one step of it."""
