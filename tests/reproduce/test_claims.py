"""The claims ledger: every claim has a check, every check a claim, and README shows what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest

from clairlib.reproduce import claims as ledger
from clairlib.reproduce.claims import LedgerError, collect, holds, insert_table, read_claims, readme_table

ROOT = Path(__file__).resolve().parents[2]
CLAIMS = read_claims(ROOT / "notebooks" / "claims.toml")
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


def write_claims(folder: Path, **changes: str) -> Path:
    entry = {"id": "C1.a", "statement": "s", "source": "ours", "notebook": "01_x", "check": "value < 1", **changes}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "claims.toml"
    path.write_text("[[claim]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in entry.items()))
    return path


def write_outcome(figures: Path, **changes) -> None:
    outcome = {"holds": True, "statement": "s", "value": 0.5, "interval": [0.25, 0.75], "threshold": "value < 1"}
    folder = figures / "01_x"
    folder.mkdir(parents=True, exist_ok=True)
    log = {"provenance": {"profile": "paper"}, "claims": {"C1.a": {**outcome, **changes}}}
    (folder / "claims.json").write_text(json.dumps(log))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_claim_has_a_check_and_every_check_a_claim(name):
    cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    checked = re.findall(r"nb\.check\(\s*\"([^\"]+)\"", code)
    assert len(checked) == len(re.findall(r"\.check\(", code)), "a check names its claim in place"
    assert sorted(checked) == sorted(claim.id for claim in CLAIMS.values() if claim.notebook == name)
    assert all(re.search(rf"\b{re.escape(claim_id)}\b", text) for claim_id in checked), "and says what it claims"


def test_every_claim_belongs_to_a_notebook():
    assert {claim.notebook for claim in CLAIMS.values()} <= set(NOTEBOOKS)  # one may record without claiming


def test_the_committed_claims_and_readme_are_what_report_writes():
    entries = collect(CLAIMS, ROOT / "figures")
    assert all(entry["profile"] == "paper" for entry in entries)
    assert (ROOT / "figures/claims.json").read_text() == ledger.as_json(entries), "stale; run: clair report"
    readme = (ROOT / "README.md").read_text()
    assert readme == insert_table(readme, readme_table(entries)), "stale; run: clair report"


@pytest.mark.parametrize(
    ("check", "value", "interval", "expected"),
    [
        ("value >= 0.95", 0.95, None, True),
        ("value > 0.95", 0.95, None, False),
        ("value == 0", 0, None, True),
        ("low <= -0.5 and high >= -0.5", -0.4, (-0.6, -0.3), True),
        ("low <= -0.5 and high >= -0.5", -0.4, (-0.45, -0.3), False),
        ("low > 0", 1.0, None, False),
        ("value < 1", float("nan"), None, False),
        ("high <= 0.02", 0.0, (float("nan"), float("nan")), False),
    ],
)
def test_holds(check, value, interval, expected):
    assert holds(check, value, interval) is expected


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"check": "value is small"}, "C1.a"),
        ({"check": "value < 1 or low > 0"}, "C1.a"),
        ({"smoke": "yes"}, "C1.a"),
        ({"source": "paper"}, "abstract or ours"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_malformed_claim_is_refused_by_name(tmp_path, changes, complaint):
    with pytest.raises(LedgerError, match=complaint):
        read_claims(write_claims(tmp_path, **changes))


def test_a_claim_twice_is_refused(tmp_path):
    path = write_claims(tmp_path)
    path.write_text(path.read_text() * 2)
    with pytest.raises(LedgerError, match="twice"):
        read_claims(path)


def test_a_claim_without_a_result_or_changed_since_is_refused(tmp_path):
    claims = read_claims(write_claims(tmp_path))
    with pytest.raises(LedgerError, match="clair reproduce 01_x --profile paper"):
        collect(claims, tmp_path)
    write_outcome(tmp_path, threshold="value < 2")
    with pytest.raises(LedgerError, match="changed since"):
        collect(claims, tmp_path)


def test_report_writes_the_list_and_the_table(tmp_path):
    write_claims(tmp_path / "notebooks")
    write_outcome(tmp_path / "figures", holds=False)
    readme = f"before\n{ledger.BEGIN}\nstale\n{ledger.END}\nafter\n"
    (tmp_path / "README.md").write_text(readme)
    [entry] = ledger.write_report(tmp_path)
    keys = "id statement source notebook value interval threshold holds profile provenance"
    assert list(entry) == keys.split()
    assert json.loads((tmp_path / "figures/claims.json").read_text()) == [entry]
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text
    assert "| C1.a: s | ours | 0.5 [0.25, 0.75] | `value < 1` **does not hold** | [01](notebooks/01_x.ipynb) |" in text


def test_a_readme_without_markers_is_refused():
    with pytest.raises(LedgerError, match="README.md"):
        insert_table("no markers", "")


def test_what_an_older_version_recorded_is_shown():
    assert ledger.measured({"value": ["a", "b"]}) == '["a", "b"]'
