"""The code behind a notebook's results, as one hash: what decides whether a result is of today's code."""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path

from clairlib.core.code import code_digest

COLAB_TAG = "bootstrap"  # the first cell, which does nothing elsewhere


def notebook_digest(path: Path, profile: str) -> str:
    """sha256 of a notebook's code cells, of what they import of this project, and of its parameters at a profile.

    Text cells, the cell for Colab and lines of magic (%, !) do not count.

    Raises
    ------
    SyntaxError
        A cell is not Python.
    """
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code" and not _is_for_colab(cell)]
    code = "\n".join(_without_magic(source) for source in sources)
    facts = [code_digest(code, path.resolve().parent), _parameters(path, profile)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _is_for_colab(cell: dict) -> bool:
    return COLAB_TAG in cell["metadata"].get("tags", [])


def _without_magic(source: str) -> str:
    if source.startswith("%%"):
        return ""
    return "\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!")))


def _parameters(path: Path, profile: str) -> dict:
    """The notebook's table in profiles.toml beside it; empty where there is none."""
    profiles = path.with_name("profiles.toml")
    return tomllib.loads(profiles.read_text()).get(profile, {}).get(path.stem, {}) if profiles.exists() else {}
