"""What a profile asks of the notebooks: parameters, checked before anything runs, and the stamp of a run."""

from __future__ import annotations

import ast
import hashlib
import json
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nbformat

from clairlib.core import provenance
from clairlib.reproduce.claims import Claim, LedgerError, read_claims
from clairlib.reproduce.sources import notebook_digest

REQUIRED = ("profile", "seed", "output")  # every notebook has these parameters
NOT_SETTABLE = {"profile", "output"}
DEFAULT_PROFILE = "smoke"  # a notebook's own defaults; every other profile is spelled out in profiles.toml


class ReproduceError(Exception):
    """The request cannot be run, and nothing was started. The message is one line that says what to do."""


@dataclass(frozen=True)
class NotebookJob:
    """A notebook that passed inspection, its parameters, and the folder ``output/profile`` it writes to."""

    name: str
    source: Path
    folder: Path
    parameters: dict[str, Any]
    stamp: str

    @property
    def results(self) -> Path:
        return self.folder / self.name

    def file(self, ending: str) -> Path:
        return self.folder / f"{self.name}.{ending}"


def plan(notebooks: Iterable[str] | None, profile: str, source: Path, folder: Path) -> list[NotebookJob]:
    """Inspect every notebook that is asked for; return the jobs to run, or raise ReproduceError."""
    available = {path.stem: path for path in sorted(source.glob("*.ipynb"))}
    if not available:
        raise ReproduceError(f"no notebooks in {source}; run in the repository's root")
    names = list(dict.fromkeys(Path(n).name.removesuffix(".ipynb") for n in notebooks or available))
    if unknown := [name for name in names if name not in available]:
        raise ReproduceError(f"no notebook {unknown[0]!r} in {source}; there are {', '.join(available)}")
    tables = _read_profiles(source / "profiles.toml", profile, available)
    ledger = source / "claims.toml"
    try:
        claims = read_claims(ledger) if ledger.exists() else {}
    except LedgerError as error:
        raise ReproduceError(str(error)) from error
    return [_inspect(available[name], profile, tables.get(name), folder, claims) for name in names]


def _read_profiles(path: Path, profile: str, available: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the tables [profile.NAME] by notebook name."""
    try:
        profiles = tomllib.loads(path.read_text()) if path.exists() else {}
    except tomllib.TOMLDecodeError as error:
        raise ReproduceError(f"{path} is not valid TOML: {error}") from error
    known = sorted({DEFAULT_PROFILE, *profiles})
    if profile not in known:
        raise ReproduceError(f"unknown profile {profile!r}; {path} knows {', '.join(known)}")
    for kind, tables in profiles.items():
        if unknown := sorted(set(tables) - set(available)):
            raise ReproduceError(f"{path} has [{kind}.{unknown[0]}], but there is no such notebook")
    return profiles.get(profile, {})


def _inspect(
    path: Path, profile: str, table: dict[str, Any] | None, folder: Path, claims: dict[str, Claim]
) -> NotebookJob:
    """Refuse what papermill would let pass: a mistyped or missing parameter, no ``parameters`` tag."""
    where = f"{profile}.{path.stem}"
    cells = nbformat.read(path, as_version=4).cells
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise ReproduceError(f"{path} must have one cell tagged 'parameters', it has {len(tagged)}")
    try:
        declared = _assigned_names(tagged[0].source)
    except SyntaxError as error:
        raise ReproduceError(f"{path}: the 'parameters' cell is not plain Python: {error}") from error
    if missing := [name for name in REQUIRED if name not in declared]:
        raise ReproduceError(f"{path} lacks parameter {missing[0]!r}; every notebook has {', '.join(REQUIRED)}")
    if table is None and profile != DEFAULT_PROFILE:
        raise ReproduceError(f"profiles.toml lacks [{where}]; add it, empty to keep the notebook's defaults")
    table, settable = table or {}, declared - NOT_SETTABLE
    if unknown := sorted(set(table) - settable):
        raise ReproduceError(f"[{where}] sets {unknown[0]!r}; it may set {', '.join(sorted(settable))}")
    parameters = {**table, "profile": profile}
    content = [[cell.cell_type, cell.source] for cell in cells]
    own = [asdict(claim) for claim in claims.values() if claim.notebook == path.stem]
    try:
        code = [notebook_digest(path, profile), provenance.versions()]
        keyed = json.dumps([content, parameters, own, code], sort_keys=True)
    except TypeError as error:  # a date: papermill would pass it as text
        raise ReproduceError(f"[{where}]: {error}; use numbers, text, true/false, lists") from error
    except SyntaxError as error:
        raise ReproduceError(f"{path}: {error.filename or 'a cell'} is not Python: {error}") from error
    stamp = hashlib.sha256(keyed.encode()).hexdigest()
    return NotebookJob(path.stem, path, folder, {**parameters, "output": str(folder / path.stem)}, stamp)


def _assigned_names(code: str) -> set[str]:
    """Return the names a cell assigns; papermill's own inspection is by line and misses "x = 'a=b'"."""
    found: set[str] = set()
    for node in ast.parse(code).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found
