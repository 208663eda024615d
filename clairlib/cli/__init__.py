"""Floor 6: the `clair` command."""

from clairlib.cli.commands import app

__all__ = ["app"]
