"""The HTML report of a reproduction: an index of the notebooks, their figures, tables and claims."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

import nbformat
from nbconvert import HTMLExporter

from clairlib.core import provenance
from clairlib.reproduce.claims import measured, write_text

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
h2 { border-top: 1px solid #ccc; padding-top: 1rem } .failed { color: #b00 } .dim { color: #666 }
img { max-height: 14rem; max-width: 100%; margin: .3rem; border: 1px solid #ddd } table { border-collapse: collapse }
td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top }
pre { background: #f5f5f5; padding: 1rem }
"""


def read_record(path: Path) -> dict[str, Any]:
    """Return a JSON record, empty if there is no such file."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_page(notebook: Path, page: Path, title: str) -> None:
    """Convert an executed notebook to one HTML file with its figures inside."""
    exporter = HTMLExporter(require_js_url="")  # widgets need it, we have none; formulas still load MathJax
    executed = nbformat.read(notebook, as_version=4)
    body, _ = exporter.from_notebook_node(executed, resources={"metadata": {"name": title}})
    write_text(page, body)


def write_index(folder: Path, names: list[str], profile: str) -> Path:
    """Write index.html, with relative links only, from the records in ``folder``; return its path."""
    sections = [_section(folder, name, read_record(folder / f"{name}.run.json")) for name in names]
    environment = escape(json.dumps(provenance.collect(), indent=1))
    title = f"clairlib notebooks, profile {escape(profile)}"
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body><h1>{title}</h1>{''.join(sections)}"
        f"<h2>Environment</h2><pre>{environment}</pre></body></html>\n"
    )
    write_text(folder / "index.html", page)
    return folder / "index.html"


def _section(folder: Path, name: str, record: dict[str, Any]) -> str:
    heading = f'<h2 id="{escape(name)}">{escape(name)}</h2>'
    if not record:
        return heading + '<p class="dim">Not run at this profile.</p>'
    made = [file for file in record["files"] if file.startswith(f"{name}/")]
    pages = [file for file in record["files"] if file.endswith((".html", ".ipynb")) and file not in made]
    facts, git = record["provenance"], record["provenance"]["git"]
    code = f"commit {git['commit'][:10]}{' with changes' if git['dirty'] else ''}" if git else "installed copy"
    said = [*map(_named_link, pages), f"{record['seconds']:.1f} s", escape(facts["time"]), code]
    failure = f'<p class="failed">Failed: {escape(record["error"])}</p>' if record["error"] else ""
    return "\n".join([heading, f"<p>{' | '.join(said)}</p>", failure, _claims(folder / name), _files(made)])


def _claims(results: Path) -> str:
    log = read_record(results / "claims.json")
    rows = [
        f"<tr{'' if claim['holds'] else ' class=failed'}><td>{escape(key)}</td>"
        f"<td>{'holds' if claim['holds'] else 'does not hold'}</td><td>{escape(claim['statement'])}</td>"
        f"<td>{escape(measured(claim))}</td><td>{escape(str(claim['threshold']))}</td></tr>"
        for key, claim in log.get("claims", {}).items()
    ]
    head = "<tr><th>claim</th><th></th><th>statement</th><th>measured</th><th>check</th></tr>"
    records = [f"{escape(key)} = {_value(item['value'])}" for key, item in log.get("records", {}).items()]
    table = f"<table>{head}{''.join(rows)}</table>" if rows else ""
    return table + (f"<p>Recorded: {'; '.join(records)}</p>" if records else "")


def _value(value: Any) -> str:
    return escape(f"{value:.4g}" if isinstance(value, float) else json.dumps(value))


def _files(made: list[str]) -> str:
    """Show thumbnails, each with a link to the PDF beside it if there is one, then the tables."""
    pictures = []
    for file in made:
        if file.endswith(".png"):
            pdf = file.removesuffix(".png") + ".pdf"
            picture = f'<img src="{escape(file)}" alt="{escape(file)}" loading="lazy">'
            pictures.append(_link(pdf if pdf in made else file, picture))
    tables = [_named_link(file) for file in made if file.endswith(".csv")]
    return "".join(pictures) + (f"<p>Tables: {', '.join(tables)}</p>" if tables else "")


def _named_link(file: str) -> str:
    return _link(file, Path(file).name)


def _link(file: str, content: str) -> str:
    return f'<a href="{escape(file)}">{content}</a>'
