"""Floor 3: CLAIR itself. The class is `clairlib.CLAIR`; each file holds one step of the method."""
