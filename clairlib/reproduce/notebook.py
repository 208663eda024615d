"""What a notebook calls: begin, show and keep a figure or table, record a number, check a claim."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import display
from matplotlib.figure import Figure

from clairlib import plots
from clairlib.core import provenance
from clairlib.core.files import write_atomically
from clairlib.reproduce import claims as ledger
from clairlib.reproduce.sources import notebook_digest


class ClaimFailed(AssertionError):
    """A claim of the notebook does not hold in this run."""


@dataclass(frozen=True)
class Notebook:
    """One run of a notebook, made by `start`. Everything it keeps goes to the folder ``output``."""

    profile: str
    seed: int
    output: Path
    claims: Mapping[str, ledger.Claim] = field(repr=False)
    _log: dict[str, Any] = field(repr=False)

    @property
    def cache(self) -> Path:
        """Folder for what outlives a run, under names that are hashes; unlike ``output`` it is never emptied."""
        return self.output.parent / "cache"

    def show_and_save(self, name: str, figure: Figure | None = None, table: pd.DataFrame | None = None) -> None:
        """Show a figure, its table or both, write NAME.pdf, NAME.png and NAME.csv, and close the figure.

        Raises ValueError if there is nothing to show, or the name is not a plain file name.
        """
        if figure is None and table is None:
            raise ValueError(f"show_and_save({name!r}) needs a figure, a table or both")
        if not name or Path(name).name != name:
            raise ValueError(f"name {name!r} must be a plain file name without folders")
        if figure is not None:
            for ending, dates in (("pdf", {"CreationDate": None}), ("png", {})):  # same figure, same bytes
                with write_atomically(self.output / f"{name}.{ending}") as path:
                    figure.savefig(path, format=ending, dpi=150, bbox_inches="tight", metadata=dates)
            display(figure)
            plt.close(figure)  # or the inline backend shows it a second time
        if table is not None:
            named_rows = not isinstance(table.index, pd.RangeIndex)
            with write_atomically(self.output / f"{name}.csv") as path:
                table.to_csv(path, index=named_rows)
            display(table)

    def record(self, key: str, value: Any, **extra: Any) -> None:
        """Keep a number under a name in claims.json; a second value of the same name replaces the first."""
        self._log["records"][key] = {"value": value, **extra}
        self._keep_log()

    def check(self, claim_id: str, value: float, interval: Sequence[float] | None = None) -> None:
        """Decide a claim by its check at this profile (see `claims.Claim`), print the outcome, keep it in claims.json.

        ``interval`` is (low, high). Raises ClaimFailed if the claim does not hold, which is kept in claims.json all the
        same, and LedgerError if claims.toml has no such claim.
        """
        if claim_id not in self.claims:
            raise ledger.LedgerError(f"claims.toml has no claim {claim_id!r}; add it, with the check that decides it")
        claim = self.claims[claim_id]
        value, ends = float(value), None if interval is None else [float(end) for end in interval]
        check = claim.check_at(self.profile)
        outcome = {
            "holds": ledger.holds(check, value, ends),
            "statement": claim.statement,
            "value": value,
            "interval": ends if ends is not None and all(map(math.isfinite, ends)) else None,
            "threshold": check,
        }
        self._log["claims"][claim_id] = outcome
        self._keep_log()
        said = f"{claim.statement} (measured {ledger.measured(outcome)}, check {check})"
        if not outcome["holds"]:
            raise ClaimFailed(f"{claim_id} does not hold: {said}")
        print(f"{claim_id} holds: {said}")

    def _keep_log(self) -> None:
        ledger.write_text(self.output / "claims.json", json.dumps(self._log, indent=1, default=_plain) + "\n")


def start(*, profile: str, seed: int, output: str | Path, claims: str | Path = "claims.toml") -> Notebook:
    """Begin a run: make the folder, forget earlier claims, set the plot style, print a provenance line.

    ``claims`` is the ledger beside the notebooks, in whose folder they run. The notebook is the one that ``output`` is
    named after. The hash of its code, None if there is no such file, is kept with what it claims.
    """
    known = ledger.read_claims(Path(claims))
    folder = Path(output).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    source = Path(f"{folder.name}.ipynb")
    code = notebook_digest(source, profile) if source.exists() else None
    facts = provenance.collect(profile=profile, seed=seed, code=code)
    notebook = Notebook(profile, seed, folder, known, {"provenance": facts, "claims": {}, "records": {}})
    notebook._keep_log()
    plt.style.use(plots.STYLE)
    print(_line(facts))
    return notebook


def _line(facts: dict[str, Any]) -> str:
    git, versions = facts["git"], facts["versions"]
    code = f"{git['commit'][:10]}{' + changes' if git['dirty'] else ''}" if git else "installed copy"
    made_with = " ".join(f"{name} {versions.get(name, '-')}" for name in ("clairlib", "python", "torch"))
    run = f"profile {facts['profile']} | seed {facts['seed']} | {facts['time']}"
    return f"{made_with} | {code} | {facts['device']} | {run}"


def _plain(value: Any) -> Any:
    """Return tensors, arrays and their scalars as lists and numbers, paths as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
