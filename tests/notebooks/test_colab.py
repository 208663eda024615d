"""The first cell of the notebooks on Colab, by a stand-in: a module google.colab, and a fresh environment.

With CLAIR_FRESH=1 (make colab-check) that environment is installed by pip, without constraints.txt; otherwise it sees
the packages of this one, but for clairlib.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from traitlets.config import Config

from clairlib.reproduce.colab import UNPUBLISHED, stamp
from clairlib.reproduce.sources import COLAB_TAG

ROOT = Path(__file__).resolve().parents[2]
NAME = "00_start_here.ipynb"
FRESH = os.environ.get("CLAIR_FRESH") == "1"
TORCH = os.environ.get("CLAIR_TORCH") or "torch"  # installed first, so that a CPU build can be named
QUIET = Config({"KernelManager": {"transport_encryption": "auto"}})  # or every kernel start warns
WHERE = """\
import clairlib
import json
import studies

json.dumps([clairlib.__file__, list(studies.__path__)])"""


def run(*command: object, cwd: Path | None = None) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def publish(folder: Path) -> Path:
    """Commit the code under test, uncommitted changes included, to a repository that the first cells then name."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():  # not where it was deleted
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    stamp(folder / "notebooks", repository=folder.as_uri())
    author = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    run("git", "init", "-q", "-b", "main", cwd=folder)
    run("git", "add", "--all", "--force", cwd=folder)
    run("git", *author, "commit", "-q", "--no-verify", "-m", "published", cwd=folder)
    return folder


def environment(folder: Path) -> Path:
    """A virtual environment without clairlib that has a module google.colab; its Python."""
    run(sys.executable, "-m", "venv", *([] if FRESH else ["--without-pip"]), folder)
    python = folder / "bin/python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    if FRESH:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        wanted = project["dependencies"] + project["optional-dependencies"]["notebooks"]
        run(python, "-m", "pip", "install", "--quiet", TORCH)
        run(python, "-m", "pip", "install", "--quiet", *wanted)
    else:
        _borrow_packages(folder / "borrowed")
        (packages / "borrowed.pth").write_text(f"{folder / 'borrowed'}\n")
    (packages / "google/colab").mkdir(parents=True)
    (packages / "google/colab/__init__.py").touch()
    return python


def _borrow_packages(folder: Path) -> None:
    """Links to everything installed here but clairlib, its record included: pip must find no clairlib to replace."""
    folder.mkdir()
    for place in sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}):
        for entry in Path(place).iterdir():
            if "clairlib" not in entry.name and entry.suffix != ".pth" and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)


def execute(notebook: NotebookNode, folder: Path, kernel: str) -> NotebookNode:
    where = {"metadata": {"path": str(folder)}}
    return NotebookClient(notebook, timeout=1800, kernel_name=kernel, resources=where, config=QUIET).execute()


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a kernel in a fresh environment that has imported google.colab before the first cell, as Colab's has."""
    python = environment(tmp_path / "fresh")
    start_up = tmp_path / "ipython/profile_default/startup/colab.py"
    start_up.parent.mkdir(parents=True)
    start_up.write_text("import google.colab\n")
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec: dict[str, Any] = {"argv": argv, "display_name": "stand-in for Colab", "language": "python"}
    spec["metadata"] = {"supported_encryption": ["curve"]}  # as ipykernel's own
    (tmp_path / "jupyter/kernels/colab").mkdir(parents=True)
    (tmp_path / "jupyter/kernels/colab/kernel.json").write_text(json.dumps(spec))
    own = {"IPYTHONDIR": tmp_path / "ipython", "JUPYTER_PATH": tmp_path / "jupyter", "OMP_NUM_THREADS": 1}
    own |= {"HF_HUB_OFFLINE": 1}
    if not FRESH:
        own["PIP_NO_BUILD_ISOLATION"] = 0  # pip reads 0 as --no-build-isolation: it downloads nothing
    for name, value in own.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return "colab"


def test_notebook_00_runs_to_its_end_where_there_is_only_its_file(tmp_path: Path, kernel: str) -> None:
    published = publish(tmp_path / "published")
    content = tmp_path / "content"
    content.mkdir()
    shutil.copy(published / "notebooks" / NAME, content)
    notebook = nbformat.read(content / NAME, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(WHERE))
    cells = [cell for cell in execute(notebook, content, kernel).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert [out for cell in cells for out in cell.outputs if out.output_type == "error"] == []
    [said] = [out.data["text/plain"] for out in cells[-1].outputs]
    library, [studies] = json.loads(said.strip("'"))
    assert (tmp_path / "fresh/lib") in Path(library).parents and "site-packages" in Path(library).parts
    assert Path(studies) == content / "clair/notebooks/studies"
    assert (content / "clair/runs/interactive/00_start_here/claims.json").exists()


def test_without_an_address_the_first_cell_says_in_one_line_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(ROOT / "notebooks" / NAME, tmp_path)
    (tmp_path / "colab.toml").write_text('repository = ""\ntag = "main"\n')
    stamp(tmp_path, repository=f"{UNPUBLISHED}/clair")
    git = tmp_path / "bin/git"
    git.parent.mkdir()
    git.write_text(f"#!/bin/sh\ntouch {tmp_path}/git_ran\n")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", f"{git.parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(tmp_path / NAME, as_version=4)
    [first] = [cell for cell in notebook.cells if COLAB_TAG in cell.metadata.get("tags", [])]
    stand_in = nbformat.v4.new_code_cell('import sys, types\nsys.modules["google.colab"] = types.ModuleType("colab")')
    notebook.cells = [stand_in, first]
    with pytest.raises(CellExecutionError):
        execute(notebook, tmp_path, "python3")
    [error] = [out for out in first.outputs if out.output_type == "error"]
    assert error.ename == "SystemExit" and "make colab REPOSITORY=owner/name" in error.evalue
    assert "\n" not in error.evalue and not (tmp_path / "git_ran").exists()
