"""Floor 4: closed forms, one file a statement, each named as its notebook. All are this project's own derivations."""
