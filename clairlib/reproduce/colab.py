"""Colab badge and first cell of every notebook, from the repository named in colab.toml beside them."""

from __future__ import annotations

import tomllib
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from clairlib.reproduce.sources import COLAB_TAG

BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({address})"
ADDRESS = "https://colab.research.google.com/github/{repository}/blob/{tag}/notebooks/{name}.ipynb"
CELL = """\
import sys

if "google.colab" in sys.modules:  # elsewhere this cell does nothing
    !git clone -q --depth 1 --branch {tag} https://github.com/{repository} clair
    %pip install -q --no-deps ./clair
    %cd -q clair/notebooks"""


def stamp(folder: Path | str) -> list[str]:
    """Write badge and first cell into every notebook of the folder; names of those that changed."""
    folder = Path(folder)
    place = tomllib.loads((folder / "colab.toml").read_text())
    changed = []
    for path in sorted(folder.glob("*.ipynb")):
        before = path.read_text()
        notebook = nbformat.reads(before, as_version=4)
        _stamp(notebook, path.stem, **place)
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
    source = CELL.format(repository=repository, tag=tag)
    found = [cell for cell in notebook.cells if COLAB_TAG in cell.metadata.get("tags", [])]
    if found:
        found[0].source = source
        return
    cell = nbformat.v4.new_code_cell(source, id=COLAB_TAG, metadata={"tags": [COLAB_TAG]})
    first = next(i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code")
    notebook.cells.insert(first, cell)
