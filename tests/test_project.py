"""The project's own files agree with each other."""

from __future__ import annotations

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


@pytest.mark.parametrize("path", sorted((ROOT / "clairlib").glob("*.py")), ids=lambda path: path.name)
def test_no_library_file_is_over_300_lines(path):
    assert len(path.read_text().splitlines()) <= 300


def test_ci_runs_make_test():
    script = ROOT / ".ci/run"
    assert script.stat().st_mode & 0o111, "must be executable"
    assert "make --no-print-directory test" in script.read_text()


def test_data_folder_lists_every_file_it_holds():
    sources = (ROOT / "data/SOURCES.md").read_text()
    held = [path for path in (ROOT / "data").rglob("*") if path.is_file() and path.name != "SOURCES.md"]
    assert all(path.name in sources for path in held)


def test_local_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text())
    local = [link for link in links if not link.startswith("http")]
    assert len(local) > 5
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_every_notebook_has_the_badge_and_the_first_cell_of_colab_toml(tmp_path):
    for path in [*(ROOT / "notebooks").glob("*.ipynb"), ROOT / "notebooks/colab.toml"]:
        shutil.copy(path, tmp_path)
    assert stamp(tmp_path) == [], "run make colab"
    (tmp_path / "colab.toml").write_text('repository = "somebody/else"\ntag = "v2"\n')
    changed = stamp(tmp_path)
    assert changed == sorted(path.stem for path in tmp_path.glob("*.ipynb"))
    for name in changed:
        text = (tmp_path / f"{name}.ipynb").read_text()
        assert f"github/somebody/else/blob/v2/notebooks/{name}.ipynb" in text and "NOT_PUBLISHED" not in text
