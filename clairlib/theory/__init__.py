"""Floor 4: closed forms, our own derivations; one file per statement, each named like its notebook."""
