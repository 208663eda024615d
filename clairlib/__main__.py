"""``python -m clairlib`` is the ``clair`` command."""

from clairlib.cli import app

app()
