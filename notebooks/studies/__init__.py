"""Computations and figures of the notebooks, one folder per notebook; `common` is shared. clairlib never imports it."""
