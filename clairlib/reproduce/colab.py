"""Colab badge and first cell of every notebook, from the repository named in colab.toml beside them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from clairlib.reproduce.claims import write_text
from clairlib.reproduce.sources import COLAB_TAG

BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({address})"
ADDRESS = "https://colab.research.google.com/github/{repository}/blob/{tag}/notebooks/{name}.ipynb"
UNPUBLISHED = "NOT_PUBLISHED_YET"  # owner of a repository without an address
CELL = """\
import os
import sys

if "google.colab" in sys.modules:  # elsewhere this cell does nothing
    !git clone -q --depth 1 --branch {tag} {address} clair
    %pip install -q --no-deps ./clair
    %cd -q clair/notebooks
    sys.path.insert(0, os.getcwd())  # worker processes look there too"""
CELL_UNPUBLISHED = """\
import sys

if "google.colab" in sys.modules:  # elsewhere this cell does nothing
    sys.exit("This repository has no public address yet. With one: make colab REPOSITORY=owner/name")"""


def stamp(folder: Path | str, repository: str | None = None) -> list[str]:
    """Write badge and first cell into every notebook of the folder; return the names of those that changed.

    The address is that of colab.toml. A new ``repository``, "owner/name" on GitHub or anything else that git clones, is
    written there first.
    """
    place = Path(folder) / "colab.toml"
    if repository:
        line = f'repository = "{repository}"'
        write_text(place, re.sub(r"^repository = .*$", lambda _: line, place.read_text(), flags=re.MULTILINE))
    address = tomllib.loads(place.read_text())
    changed = []
    for path in sorted(Path(folder).glob("*.ipynb")):
        before = path.read_text()
        notebook = nbformat.reads(before, as_version=4)
        _stamp(notebook, path.stem, **address)
        after = nbformat.writes(notebook) + "\n"
        if after != before:
            path.write_text(after)
            changed.append(path.stem)
    return changed


def _stamp(notebook: NotebookNode, name: str, repository: str, tag: str) -> None:
    title, *text = notebook.cells[0].source.split("\n")
    rest = "\n".join(line for line in text if not line.startswith(BADGE.partition("{")[0])).lstrip("\n")
    badge = BADGE.format(address=ADDRESS.format(repository=repository, tag=tag, name=name))
    notebook.cells[0].source = f"{title}\n\n{badge}\n\n{rest}"
    on_github = repository.count("/") == 1 and not repository.startswith("/")
    address = f"https://github.com/{repository}" if on_github else repository
    is_published = not repository.startswith(UNPUBLISHED)
    source = CELL.format(address=address, tag=tag) if is_published else CELL_UNPUBLISHED
    found = [cell for cell in notebook.cells if COLAB_TAG in cell.metadata.get("tags", [])]
    if found:
        found[0].source = source
        return
    cell = nbformat.v4.new_code_cell(source, id=COLAB_TAG, metadata={"tags": [COLAB_TAG]})
    first = next(i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code")
    notebook.cells.insert(first, cell)
