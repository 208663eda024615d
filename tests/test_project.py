"""The project's own files agree with each other."""

from __future__ import annotations

import ast
import re
import shutil
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from clairlib.reproduce.colab import stamp

ROOT = Path(__file__).resolve().parents[1]
CONDA_NAMES = {"pytorch": "torch"}  # conda-forge's name: PyPI's
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def floors(requirements: list[str]) -> dict[str, str]:
    """Name to version specifier; the project's own extras left out."""
    parsed = [Requirement(text) for text in requirements]
    outside = [r for r in parsed if r.name != "clairlib"]
    return {canonicalize_name(CONDA_NAMES.get(r.name, r.name)): str(r.specifier) for r in outside}


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def test_environment_yml_has_the_floors_of_pyproject_and_nothing_else():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    *packages, pip, from_pip = environment["dependencies"]
    expected = floors(PROJECT["dependencies"] + EXTRAS["notebooks"])
    assert floors(packages) == expected | {"python": PROJECT["requires-python"]}
    assert (pip, from_pip) == ("pip", {"pip": ["-e ."]})


def test_constraints_pin_every_requirement_within_its_floor():
    pinned = pins()
    requirements = [Requirement(text) for text in PROJECT["dependencies"] + sum(EXTRAS.values(), [])]
    for requirement in requirements:
        if requirement.name != "clairlib":
            assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_constraints_hold_plain_public_versions_only():
    """A hash, an address or +cpu would tie the pins to one index or one kind of machine."""
    for name, version in pins().items():
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version), (name, version)


def test_citation_names_the_paper_and_the_package_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    paper = citation["preferred-citation"]
    assert citation["version"] == PROJECT["version"]
    assert [a["family-names"] for a in paper["authors"]] == ["He", "Chen", "Feng"]
    assert "2605.21217" in paper["url"]


def test_licence_is_the_one_declared():
    assert PROJECT["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


SOURCES = sorted([*(ROOT / "clairlib").rglob("*.py"), *(ROOT / "notebooks/studies").rglob("*.py")])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_functions_are_short_and_files_not_long(path):
    """Bodies without their docstrings have at most 40 lines, files at most 350."""
    text = path.read_text()
    assert len(text.splitlines()) <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            assert node.end_lineno - body[0].lineno < 40, node.name


def test_clairlib_is_compact():
    lines = sum(len(path.read_text().splitlines()) for path in (ROOT / "clairlib").rglob("*.py"))
    assert lines <= 12_000


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1200


def test_the_contract_is_short_and_has_no_exceptions():
    text = (ROOT / "pyproject.toml").read_text()
    contract = [line for line in text[text.index("[tool.importlinter]") :].splitlines() if line.strip()]
    assert len(contract) <= 15 and "ignore" not in "".join(contract)


def test_pre_commit_lints_what_make_test_lints():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    recipe = (ROOT / "Makefile").read_text()
    for hook in hooks:
        command = hook["entry"].split(".venv/bin/")[1].split()
        assert f"$(BIN)/{command[0]}" in recipe, hook["id"]


def test_ci_runs_make_test():
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o111, "must be executable"
    assert "make --no-print-directory test" in script.read_text()


def test_data_folder_lists_every_file_it_holds():
    sources = (ROOT / "data/SOURCES.md").read_text()
    held = [path for path in (ROOT / "data").rglob("*") if path.is_file() and path.name != "SOURCES.md"]
    assert all(path.name in sources for path in held)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/claims.md", "docs/limits.md", "docs/method.md"])
def test_local_links_of_a_page_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text())
    local = [link for link in links if not link.startswith("http")]
    assert local and [link for link in local if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_claims_named_in_the_docs_exist():
    known = {claim["id"] for claim in tomllib.loads((ROOT / "notebooks/claims.toml").read_text())["claim"]}
    for page in ("README.md", "docs/limits.md", "docs/method.md"):
        named = set(re.findall(r"\bC\d\.[a-z]\b", (ROOT / page).read_text()))
        assert named <= known, page


def test_every_notebook_has_the_badge_and_the_first_cell_of_colab_toml(tmp_path):
    for path in [*(ROOT / "notebooks").glob("*.ipynb"), ROOT / "notebooks/colab.toml"]:
        shutil.copy(path, tmp_path)
    assert stamp(tmp_path) == [], "run make colab"
    (tmp_path / "colab.toml").write_text('repository = "somebody/else"\ntag = "v2"\n')
    changed = stamp(tmp_path)
    assert changed == sorted(path.stem for path in tmp_path.glob("*.ipynb"))
    for name in changed:
        text = (tmp_path / f"{name}.ipynb").read_text()
        assert "git clone -q --depth 1 --branch v2 https://github.com/somebody/else clair" in text
        assert f"github/somebody/else/blob/v2/notebooks/{name}.ipynb" in text and "NOT_PUBLISHED" not in text


def test_a_fork_sets_its_address_by_one_call(tmp_path):
    for path in [ROOT / "notebooks/00_start_here.ipynb", ROOT / "notebooks/colab.toml"]:
        shutil.copy(path, tmp_path)
    assert stamp(tmp_path, "owner/fork") == ["00_start_here"] and stamp(tmp_path) == []
    assert tomllib.loads((tmp_path / "colab.toml").read_text())["repository"] == "owner/fork"
    assert "https://github.com/owner/fork clair" in (tmp_path / "00_start_here.ipynb").read_text()
