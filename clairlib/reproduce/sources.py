"""The code behind a notebook's results, as one hash: what decides whether a result is of today's code."""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path

from clairlib.core.code import code_digest

COLAB_TAG = "bootstrap"  # the first cell, which does nothing elsewhere


def notebook_digest(path: Path, profile: str) -> str:
    """Return the sha256 of a notebook's code cells, what they import of this project, and its parameters at a profile.

    Text cells, the cell for Colab and lines of magic (%, !) do not count. The parameters are the notebook's table in
    profiles.toml beside it. Raises SyntaxError if a cell is not Python.
    """
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code_cells = [cell for cell in cells if cell["cell_type"] == "code"]
    counted = [cell for cell in code_cells if COLAB_TAG not in cell["metadata"].get("tags", [])]
    code = "\n".join(_without_magic("".join(cell["source"])) for cell in counted)
    profiles = path.with_name("profiles.toml")
    tables = tomllib.loads(profiles.read_text()) if profiles.exists() else {}
    facts = [code_digest(code, path.resolve().parent), tables.get(profile, {}).get(path.stem, {})]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _without_magic(source: str) -> str:
    if source.startswith("%%"):
        return ""
    return "\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!")))
