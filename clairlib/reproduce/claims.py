"""The claims ledger: what is claimed, the check that decides it, and what was measured.

``notebooks/claims.toml`` lists the claims. A notebook measures a value for each of its own, and `holds` decides.
`write_report` joins both into ``figures/claims.json`` and the table of ``docs/claims.md``.
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

from clairlib.core import provenance
from clairlib.core.files import write_atomically
from clairlib.reproduce.sources import notebook_digest

SOURCES = ("abstract", "ours")
RELATIONS = {"<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt, "==": operator.eq}
CLAUSE = re.compile(r"(value|low|high) (<=|<|>=|>|==) (-?\d+(?:\.\d+)?(?:e-?\d+)?)")
BEGIN, END = "<!-- claims: written by clair report -->", "<!-- end of claims -->"


class LedgerError(Exception):
    """The ledger, or what was recorded for it, cannot be used. The message is one line that says what to do."""


@dataclass(frozen=True)
class Claim:
    """A claim of the paper's abstract or of this project, as ``source`` says.

    ``check`` is one or more clauses joined by "and", each of ``value``, ``low`` or ``high`` (the ends of the interval)
    against a number: "value >= 0.95 and low > 0". At the smoke profile, where intervals are too wide for it, ``smoke``
    takes its place if it is given.
    """

    id: str
    statement: str
    source: str
    notebook: str
    check: str
    smoke: str | None = None

    def check_at(self, profile: str) -> str:
        return self.smoke if profile == "smoke" and self.smoke is not None else self.check


def read_claims(path: Path) -> dict[str, Claim]:
    """Return the claims of claims.toml by id; LedgerError names the claim that is not well formed."""
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
        for check in (claim.check, claim.check_at("smoke")):
            if not all(CLAUSE.fullmatch(clause) for clause in check.split(" and ")):
                raise LedgerError(f"{path}: claim {claim.id!r} has check {check!r}, not 'value >= 0.95' or like it")
        claims[claim.id] = claim
    return claims


def holds(check: str, value: float, interval: Sequence[float] | None = None) -> bool:
    """Say whether a value, with its interval, passes a check. A clause about a missing or NaN number fails."""
    low, high = interval if interval is not None else (math.nan, math.nan)
    measured = {"value": value, "low": low, "high": high}
    clauses = (clause.split() for clause in check.split(" and "))
    return all(RELATIONS[relation](measured[name], float(bound)) for name, relation, bound in clauses)


def collect(claims: dict[str, Claim], root: Path) -> list[dict[str, Any]]:
    """Return what ``figures/NOTEBOOK/claims.json`` holds for every claim, and why it is stale, if it is.

    ``stale`` lists the reasons. It is empty if the result is of a clean tree, of an ancestor of today's commit, and of
    the code that the notebook has today. ``value`` is None where nothing was measured.

    Raises
    ------
    LedgerError
        A result is not of the profile "paper".
    """
    logs = {name: _log(root, name) for name in {claim.notebook for claim in claims.values()}}
    reasons = {name: _reasons(root, name, log["provenance"]) for name, log in logs.items() if log}
    entries = []
    for claim in claims.values():
        log = logs[claim.notebook]
        entry: dict[str, Any] = {key: getattr(claim, key) for key in ("id", "statement", "source", "notebook")}
        entry |= {"value": None, "interval": None, "threshold": claim.check, "holds": None}
        stale = ["nothing was measured"]
        if outcome := log.get("claims", {}).get(claim.id):
            entry |= {"value": outcome["value"], "interval": outcome["interval"]}
            entry["holds"] = holds(claim.check, outcome["value"], outcome["interval"])
            changed = [key for key in ("statement", "threshold") if outcome[key] != entry[key]]
            stale = reasons[claim.notebook] + [f"the claim's {key} was changed" for key in changed]
        entries.append(entry | {"stale": stale, "provenance": log.get("provenance")})
    return entries


def _log(root: Path, notebook: str) -> dict[str, Any]:
    path = root / "figures" / notebook / "claims.json"
    log = json.loads(path.read_text()) if path.exists() else {}
    if log and (profile := log["provenance"]["profile"]) != "paper":
        raise LedgerError(f"{path} is of profile {profile!r}; run: clair reproduce {notebook} --profile paper")
    return log


def _reasons(root: Path, notebook: str, facts: dict[str, Any]) -> list[str]:
    """Return why the results of a notebook are stale."""
    git, found = facts.get("git"), []
    if git is None:
        found.append("of an installed copy, whose commit is not known")
    elif git["dirty"]:
        found.append(f"of a tree with changes after commit {git['commit'][:10]}")
    elif not provenance.is_ancestor(root, git["commit"]):
        found.append(f"of commit {git['commit'][:10]}, which is no ancestor of today's")
    if facts.get("code") is None:
        found.append("the code behind it was not recorded")
    elif facts["code"] != notebook_digest(root / "notebooks" / f"{notebook}.ipynb", "paper"):
        found.append("of other code than today's")
    return found


def claims_table(entries: list[dict[str, Any]]) -> str:
    """Return the claims as Markdown: a table, and what has to be run again."""
    lines = ["| claim | whose | measured | check | notebook | result |", "|---|---|---|---|---|---|"]
    for entry in entries:
        notebook = f"[{entry['notebook'][:2]}](../notebooks/{entry['notebook']}.ipynb)"
        verdict = f"`{entry['threshold']}`" + (" **does not hold**" if entry["holds"] is False else "")
        statement = f"{entry['id']}: {entry['statement']}".replace("|", "\\|")
        state = "stale" if entry["stale"] else "current"
        lines.append(f"| {statement} | {entry['source']} | {measured(entry)} | {verdict} | {notebook} | {state} |")
    return "\n".join([*lines, "", *_reruns(entries)])


def _reruns(entries: list[dict[str, Any]]) -> list[str]:
    """Say which notebooks to run again, and why."""
    why: dict[str, dict[str, None]] = {}  # notebook: reasons, each once
    for entry in entries:
        if entry["stale"]:
            why.setdefault(entry["notebook"], {}).update(dict.fromkeys(entry["stale"]))
    if not why:
        return ["Every result is of today's code."]
    command = f"    clair reproduce {' '.join(why)} --profile paper"
    return ["Stale results, and why:", "", *(f"- {name}: {'; '.join(own)}" for name, own in why.items()), "", command]


def measured(entry: dict[str, Any]) -> str:
    """Return a value with its interval as text; values that are no numbers, of older versions, as JSON."""
    value = entry["value"]
    if value is None:
        return "-"
    text = f"{value:.4g}" if isinstance(value, (int, float)) else json.dumps(value)
    return text if entry.get("interval") is None else f"{text} [{entry['interval'][0]:.4g}, {entry['interval'][1]:.4g}]"


def insert_table(page: str, table: str) -> str:
    """Return the page with the table between its markers."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise LedgerError(f"docs/claims.md needs the lines {BEGIN} and {END}, once each")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def write_report(root: Path, *, strict: bool = False) -> list[dict[str, Any]]:
    """Write ``figures/claims.json`` and the table of ``docs/claims.md``; return the entries.

    Raises
    ------
    LedgerError
        The ledger or its results cannot be used or, with ``strict``, a result is stale. Nothing was written.
    """
    entries = collect(read_claims(root / "notebooks" / "claims.toml"), root)
    stale = list(dict.fromkeys(entry["notebook"] for entry in entries if entry["stale"]))
    if strict and stale:
        raise LedgerError(f"stale results; run: clair reproduce {' '.join(stale)} --profile paper")
    page = root / "docs" / "claims.md"
    text = insert_table(page.read_text(), claims_table(entries))
    write_text(root / "figures" / "claims.json", json.dumps(entries, indent=1) + "\n")
    write_text(page, text)
    return entries


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    with write_atomically(path) as partial:
        partial.write_text(text)
