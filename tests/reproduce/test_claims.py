"""The claims ledger: every claim has a check, every check a claim, and docs/claims.md shows what was measured."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import nbformat
import pytest

from clairlib.reproduce import claims as ledger
from clairlib.reproduce.claims import LedgerError, claims_table, collect, holds, insert_table, read_claims
from clairlib.reproduce.sources import notebook_digest

ROOT = Path(__file__).resolve().parents[2]
CLAIMS = read_claims(ROOT / "notebooks" / "claims.toml")
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


def write_claims(folder: Path, **changes: str) -> Path:
    entry = {"id": "C1.a", "statement": "s", "source": "ours", "notebook": "01_x", "check": "value < 1", **changes}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "claims.toml"
    path.write_text("[[claim]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in entry.items()))
    return path


def write_outcome(figures: Path, facts: dict[str, Any]) -> None:
    outcome = {"holds": True, "statement": "s", "value": 0.5, "interval": [0.25, 0.75], "threshold": "value < 1"}
    folder = figures / "01_x"
    folder.mkdir(parents=True, exist_ok=True)
    log = {"provenance": facts, "claims": {"C1.a": outcome}}
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


def test_the_committed_claims_and_their_page_are_what_report_writes():
    """No result is called current that is not; why one is stale may change with every commit."""
    entries = collect(CLAIMS, ROOT)
    committed = json.loads((ROOT / "figures/claims.json").read_text())
    assert [entry | {"stale": []} for entry in committed] == [entry | {"stale": []} for entry in entries], AGAIN
    assert all(today["stale"] == [] for was, today in zip(committed, entries, strict=True) if not was["stale"]), AGAIN
    page = (ROOT / "docs/claims.md").read_text()
    assert page == insert_table(page, claims_table(committed)), AGAIN


AGAIN = "run: clair report"


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


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", folder, *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A checkout with one notebook, its claim, and the page; no result yet."""
    write_claims(tmp_path / "notebooks")
    cells = [nbformat.v4.new_code_cell("import solver"), nbformat.v4.new_markdown_cell("text")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "notebooks/01_x.ipynb")
    (tmp_path / "notebooks/solver.py").write_text("x = 1\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "figures").mkdir()
    (tmp_path / "docs/claims.md").write_text(f"before\n{ledger.BEGIN}\nold\n{ledger.END}\nafter\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def measure(project: Path, **facts: Any) -> None:
    """A result of the project as it is, but for ``facts`` of its provenance."""
    code = notebook_digest(project / "notebooks/01_x.ipynb", "paper")
    state = {"commit": git(project, "rev-parse", "HEAD"), "dirty": False}
    write_outcome(project / "figures", {"profile": "paper", "git": state, "code": code} | facts)


def stale(project: Path) -> list[str]:
    [entry] = collect(read_claims(project / "notebooks/claims.toml"), project)
    return entry["stale"]


def test_a_result_of_today_is_current(project):
    measure(project)
    assert stale(project) == []
    (project / "notebooks/plot.py").write_text("y = 1\n")
    assert stale(project) == [], "what the notebook does not import is no code of its own"


def test_a_result_of_other_code_is_stale(project):
    measure(project)
    (project / "notebooks/solver.py").write_text("x = 2\n")
    assert stale(project) == ["of other code than today's"]


def test_a_result_of_other_parameters_is_stale(project):
    measure(project)
    (project / "notebooks/profiles.toml").write_text("[paper.01_x]\nsize = 2\n")
    assert stale(project) == ["of other code than today's"]


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"git": {"commit": "a" * 40, "dirty": False}}, "of commit aaaaaaaaaa, which is no ancestor of today's"),
        ({"git": {"commit": "a" * 40, "dirty": True}}, "of a tree with changes after commit aaaaaaaaaa"),
        ({"git": None}, "of an installed copy, whose commit is not known"),
        ({"code": None}, "the code behind it was not recorded"),
    ],
)
def test_a_result_of_a_commit_or_code_that_is_not_known_is_stale(project, facts, reason):
    measure(project, **facts)
    assert stale(project) == [reason]


def test_a_result_of_an_earlier_commit_is_current_and_one_of_another_branch_is_not(project):
    measure(project)
    git(project, "commit", "-qm", "second", "--allow-empty")
    assert stale(project) == []
    git(project, "checkout", "-q", "--orphan", "other")
    git(project, "commit", "-qm", "third", "--allow-empty")
    assert len(stale(project)) == 1


def test_a_claim_that_was_changed_or_not_measured_is_stale(project):
    assert stale(project) == ["nothing was measured"]
    measure(project)
    write_claims(project / "notebooks", check="value < 0.2")
    [entry] = collect(read_claims(project / "notebooks/claims.toml"), project)
    assert entry["stale"] == ["the claim's threshold was changed"] and entry["holds"] is False


def test_a_result_of_another_profile_is_refused(project):
    measure(project, profile="smoke")
    with pytest.raises(LedgerError, match="clair reproduce 01_x --profile paper"):
        stale(project)


def test_report_writes_the_list_and_the_table(project):
    measure(project, code=None)
    [entry] = ledger.write_report(project)
    keys = "id statement source notebook value interval threshold holds stale provenance"
    assert list(entry) == keys.split()
    assert json.loads((project / "figures/claims.json").read_text()) == [entry]
    text = (project / "docs/claims.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| C1.a: s | ours | 0.5 [0.25, 0.75] | `value < 1` | [01](../notebooks/01_x.ipynb) | stale |" in text
    assert "- 01_x: the code behind it was not recorded" in text and "clair reproduce 01_x --profile paper" in text
    measure(project)
    ledger.write_report(project, strict=True)
    assert "| current |" in (project / "docs/claims.md").read_text()


def test_strict_refuses_stale_results_and_writes_nothing(project):
    measure(project, code=None)
    before = (project / "docs/claims.md").read_text()
    with pytest.raises(LedgerError, match="clair reproduce 01_x --profile paper"):
        ledger.write_report(project, strict=True)
    assert (project / "docs/claims.md").read_text() == before and not (project / "figures/claims.json").exists()


def test_a_page_without_markers_is_refused():
    with pytest.raises(LedgerError, match="claims.md"):
        insert_table("no markers", "")


def test_what_an_older_version_recorded_is_shown():
    assert ledger.measured({"value": ["a", "b"]}) == '["a", "b"]'
