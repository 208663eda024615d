"""The hash of the code behind a result: changes with what is imported, and with nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from clairlib.core.code import code_digest, module_digest

ROOT = Path(__file__).resolve().parents[2]
STUDIES = ROOT / "notebooks" / "studies"

LAZY = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from work.lazy.home import thing\n"
FILES = {
    "work/__init__.py": "",
    "work/study.py": "from work import solver\ndef cell():\n    from work.late import late\n    return late()\n",
    "work/solver.py": '"""Solves."""\n\n\ndef solve():\n    return 1\n',
    "work/late.py": "def late():\n    return 2\n",
    "work/plots.py": "from work.study import cell\n",
    "work/lazy/__init__.py": LAZY,
    "work/lazy/home.py": "thing = 1\n",
    "work/page.py": "x = 1\n",
    "work/page.css": "a {}\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def digest(folder: Path, text: str = "from work.study import cell") -> str:
    return code_digest(text, folder)


@pytest.mark.parametrize("name", ["study", "solver", "late", "__init__"])
def test_a_change_of_what_is_imported_changes_the_hash(folder, name):
    before = digest(folder)
    (folder / f"work/{name}.py").write_text(FILES[f"work/{name}.py"] + "\nmore = 3\n")
    assert digest(folder) != before


def test_a_change_of_what_is_not_imported_does_not(folder):
    before = digest(folder)
    (folder / "work/plots.py").write_text("colour = 'red'\n")
    (folder / "work/page.css").write_text("b {}\n")
    assert digest(folder) == before


def test_docstrings_comments_and_blank_lines_do_not_count(folder):
    before = digest(folder)
    text = '"""Solves\nall.\n"""\n# how\n\n\ndef solve():\n    """At once."""\n\n    return 1\n'
    (folder / "work/solver.py").write_text(text)
    assert digest(folder) == before
    (folder / "work/solver.py").write_text('"""Solves."""\n\n\ndef solve():\n    return "# 1"\n')
    assert digest(folder) != before


def test_a_name_that_a_package_loads_lazily_leads_to_its_home(folder):
    text = "from work.lazy import thing"
    before, without = digest(folder, text), digest(folder, "import work.lazy")
    (folder / "work/lazy/home.py").write_text("thing = 2\n")
    assert digest(folder, text) != before
    assert digest(folder, "import work.lazy") == without, "the package alone loads nothing"


def test_a_file_of_the_same_stem_belongs_to_its_module(folder):
    before = digest(folder, "import work.page")
    (folder / "work/page.css").write_text("b {}\n")
    assert digest(folder, "import work.page") != before


def test_the_hash_does_not_depend_on_where_the_folder_lies(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name, text in FILES.items():
        (elsewhere / name).parent.mkdir(parents=True, exist_ok=True)
        (elsewhere / name).write_text(text)
    assert digest(folder) == digest(elsewhere)


def changed_by(monkeypatch, module: str, text: str, beside: Path = ROOT / "notebooks") -> bool:
    """Whether the hash changes with the code of a clairlib or studies module."""
    from clairlib.core import code

    before = code_digest(text, beside)
    read = code.read_source
    target = (ROOT / "clairlib" if module.startswith("clairlib") else ROOT / "notebooks/studies") / (
        module.split(".", 1)[1].replace(".", "/") + ".py"
    )
    assert target.exists()
    monkeypatch.setattr(code, "read_source", lambda file: read(file) + ("\nchanged = 1\n" if file == target else ""))
    return code_digest(text, beside) != before


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("clairlib.recovery.consensus", True),
        ("clairlib.linalg.rank", True),
        ("studies.common.verdicts", True),
        ("studies.attacks.study", True),
        ("clairlib.plots", False),
        ("studies.common.plots", False),
        ("studies.language_models.labels", False),
        ("clairlib.alignment.page", False),
    ],
)
def test_a_plot_reruns_no_sweep_and_a_solver_all_that_depend_on_it(monkeypatch, module, expected):
    text = "from studies.attacks.study import planted_cell"
    if module == "clairlib.alignment.page":  # text copying aligns adapter folders, and its page is written then
        text = "from studies.start_here.study import recovery_cell"
    assert changed_by(monkeypatch, module, text) is expected


def test_a_module_that_is_run_by_name_counts(monkeypatch):
    assert changed_by(monkeypatch, "clairlib.cli.commands", 'run([python, "-m", "clairlib", "align"])')


def test_a_module_is_known_by_name_and_file():
    file = STUDIES / "start_here" / "study.py"
    assert module_digest("studies.start_here.study", file) == code_digest(file.read_text(), ROOT / "notebooks")
