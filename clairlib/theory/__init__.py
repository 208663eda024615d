"""Floor 4: closed forms, one file per statement, each named like its notebook.

All are this project's own derivations.
"""
