"""The claims ledger: what is claimed, the check that decides it, and what was measured.

``notebooks/claims.toml`` lists the claims; a notebook measures a value for each of its own and ``holds`` decides.
``write_report`` joins both into ``figures/claims.json`` and the table of README.
"""

from __future__ import annotations

import json
import math
import operator
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCES = ("abstract", "ours")
RELATIONS = {"<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt, "==": operator.eq}
CLAUSE = re.compile(r"(value|low|high) (<=|<|>=|>|==) (-?\d+(?:\.\d+)?(?:e-?\d+)?)")
BEGIN, END = "<!-- claims: written by clair report -->", "<!-- end of claims -->"


class LedgerError(Exception):
    """The ledger, or what was recorded for it, is not usable. One line that says what to do."""


@dataclass(frozen=True)
class Claim:
    """One claim: ``source`` says whether it is the abstract's or this project's own.

    ``check`` is one or more clauses joined by "and", each of ``value``, ``low`` or ``high`` (the ends of the interval)
    against a number: "value >= 0.95 and low > 0". ``smoke`` takes its place at the smoke profile, where intervals are
    too wide for it; the same check where None.
    """

    id: str
    statement: str
    source: str
    notebook: str
    check: str
    smoke: str | None = None

    def check_at(self, profile: str) -> str:
        """The check that decides at a profile."""
        return self.smoke if profile == "smoke" and self.smoke is not None else self.check


def read_claims(path: Path) -> dict[str, Claim]:
    """The claims of claims.toml by id; LedgerError names the claim that is not well formed."""
    try:
        entries = tomllib.loads(path.read_text()).get("claim", [])
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise LedgerError(f"cannot read the claims in {path}: {error}") from error
    claims: dict[str, Claim] = {}
    for entry in entries:
        try:
            claim = Claim(**entry)
        except TypeError as error:
            raise LedgerError(f"{path}: claim {entry.get('id')!r}: {error}") from error
        if claim.id in claims:
            raise LedgerError(f"{path} has claim {claim.id!r} twice")
        if claim.source not in SOURCES:
            raise LedgerError(f"{path}: claim {claim.id!r} has source {claim.source!r}, not {' or '.join(SOURCES)}")
        for check in (claim.check, *([] if claim.smoke is None else [claim.smoke])):
            if not all(CLAUSE.fullmatch(clause) for clause in check.split(" and ")):
                raise LedgerError(f"{path}: claim {claim.id!r} has check {check!r}, not 'value >= 0.95' or like it")
        claims[claim.id] = claim
    return claims


def holds(check: str, value: float, interval: Sequence[float] | None = None) -> bool:
    """Does a measured value, with its interval, pass a check? A clause about a missing or NaN number fails."""
    low, high = interval if interval is not None else (math.nan, math.nan)
    measured = {"value": value, "low": low, "high": high}
    return all(
        RELATIONS[relation](measured[name], float(bound))
        for name, relation, bound in (CLAUSE.fullmatch(clause).groups() for clause in check.split(" and "))  # type: ignore[union-attr]
    )


def collect(claims: dict[str, Claim], figures: Path) -> list[dict[str, Any]]:
    """What was measured for every claim, from ``figures/NOTEBOOK/claims.json``; LedgerError where that is missing."""
    entries = []
    for claim in claims.values():
        path = figures / claim.notebook / "claims.json"
        log = json.loads(path.read_text()) if path.exists() else {"claims": {}}
        outcome = log["claims"].get(claim.id)
        again = f"run: clair reproduce {claim.notebook} --profile paper"
        if outcome is None:
            raise LedgerError(f"claim {claim.id} has no result in {path}; {again}")
        profile = log["provenance"]["profile"]
        if profile != "paper":
            raise LedgerError(f"{path} is of profile {profile!r}; {again}")
        if (outcome["statement"], outcome["threshold"]) != (claim.statement, claim.check_at(profile)):
            raise LedgerError(f"claim {claim.id} was changed since {path} was written; {again}")
        entries.append(
            {
                "id": claim.id,
                "statement": claim.statement,
                "source": claim.source,
                "notebook": claim.notebook,
                "value": outcome["value"],
                "interval": outcome["interval"],
                "threshold": outcome["threshold"],
                "holds": outcome["holds"],
                "profile": profile,
                "provenance": log["provenance"],
            }
        )
    return entries


def readme_table(entries: list[dict[str, Any]]) -> str:
    """The claims as a Markdown table."""
    lines = ["| claim | whose | measured | check | notebook |", "|---|---|---|---|---|"]
    for entry in entries:
        notebook = f"[{entry['notebook'][:2]}](notebooks/{entry['notebook']}.ipynb)"
        verdict = f"`{entry['threshold']}`" if entry["holds"] else f"`{entry['threshold']}` **does not hold**"
        statement = f"{entry['id']}: {entry['statement']}".replace("|", "\\|")
        lines.append(f"| {statement} | {entry['source']} | {measured(entry)} | {verdict} | {notebook} |")
    return "\n".join(lines)


def measured(entry: dict[str, Any]) -> str:
    """A value with its interval, as text; what an older version recorded stays readable."""
    value = entry["value"]
    text = f"{value:.4g}" if isinstance(value, (int, float)) else json.dumps(value)
    return text if entry.get("interval") is None else f"{text} [{entry['interval'][0]:.4g}, {entry['interval'][1]:.4g}]"


def insert_table(readme: str, table: str) -> str:
    """README with the table between its markers."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise LedgerError(f"README.md needs the lines {BEGIN} and {END}, once each")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def write_report(root: Path) -> list[dict[str, Any]]:
    """Write ``figures/claims.json`` and the claims table of README; the entries."""
    entries = collect(read_claims(root / "notebooks" / "claims.toml"), root / "figures")
    readme = root / "README.md"
    text = insert_table(readme.read_text(), readme_table(entries))
    for path, content in ((root / "figures" / "claims.json", as_json(entries)), (readme, text)):
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(content)
        partial.replace(path)
    return entries


def as_json(entries: list[dict[str, Any]]) -> str:
    """The text of ``figures/claims.json``."""
    return json.dumps(entries, indent=1) + "\n"
