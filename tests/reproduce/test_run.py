"""Notebooks through papermill: what is refused, resumed, left by a kill; every notebook of the project."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import nbformat
import psutil
import pytest

from clairlib.reproduce import profiles
from clairlib.reproduce.profiles import plan
from clairlib.reproduce.run import NotebookRun, ReproduceError, reproduce
from helpers.processes import HANG_SECONDS, Signals

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = 'profile = "smoke"\nseed = 0\noutput = "out"\nsize = 3'
RESULT = """\
from functools import partial
from pathlib import Path
rows = [seed * 10 + i for i in range(size)]
Path(output, "rows.csv").write_text("\\n".join(map(str, rows)))"""


def write_notebook(
    folder: Path, name: str, *cells: str, parameters: str = PARAMETERS, tag: str = "parameters"
) -> None:
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": [tag]})
    notebook = nbformat.v4.new_notebook(cells=[first, *map(nbformat.v4.new_code_cell, cells)])
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder / f"{name}.ipynb")


def run(tmp_path: Path, **options) -> list[NotebookRun]:
    options = {"source": tmp_path / "nb", "output": tmp_path / "runs", "progress": False} | options
    return reproduce(**options)


def test_a_second_run_is_skipped_until_notebook_parameters_or_library_change(tmp_path, monkeypatch):
    source = tmp_path / "nb"
    write_notebook(source, "01_rows", RESULT)
    [first] = run(tmp_path)
    assert (first.status, first.error) == ("ran", None)
    assert (first.output / "rows.csv").read_text() == "0\n1\n2"
    assert run(tmp_path)[0].status == "cached"
    assert run(tmp_path, force=True)[0].status == "ran"

    (source / "profiles.toml").write_text("[smoke.01_rows]\nsize = 2\nseed = 4\n")
    assert run(tmp_path)[0].status == "ran"
    assert (first.output / "rows.csv").read_text() == "40\n41"

    (first.output / "rows.csv").unlink()
    assert run(tmp_path)[0].status == "ran", "a deleted table must come back"

    write_notebook(source, "01_rows", RESULT, "1 + 1")
    assert run(tmp_path)[0].status == "ran"
    monkeypatch.setattr(profiles, "notebook_digest", lambda path, profile: "changed")
    assert run(tmp_path)[0].status == "ran"
    assert run(tmp_path)[0].status == "cached"


def test_a_run_starts_from_an_empty_folder(tmp_path):
    write_notebook(tmp_path / "nb", "01_rows", RESULT)
    stale = tmp_path / "runs/smoke/01_rows/figure_of_last_week.png"
    stale.parent.mkdir(parents=True)
    stale.touch()
    run(tmp_path)
    assert not stale.exists()


@pytest.mark.parametrize(
    ("table", "options", "complaint"),
    [
        ("", {"notebooks": ["02_row"]}, "no notebook '02_row'"),
        ("", {"profile": "large"}, "unknown profile 'large'"),
        ("", {"jobs": 0}, "at least 1"),
        ("[paper]", {"profile": "paper"}, "lacks \\[paper.01_rows\\]"),
        ("[smoke.01_rows]\nsizes = 3", {}, "'sizes'"),
        ("[smoke.01_rows]\noutput = '/tmp'", {}, "'output'"),
        ("[smoke.01_rows]\nsize = 2026-01-01", {}, "date is not JSON"),
        ("[paper.01_row]\nsize = 3", {}, "paper.01_row.*no such notebook"),
        ("[smoke", {}, "not valid TOML"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_runs(tmp_path, table, options, complaint):
    write_notebook(tmp_path / "nb", "01_rows", RESULT)
    (tmp_path / "nb/profiles.toml").write_text(table)
    with pytest.raises(ReproduceError, match=complaint):
        run(tmp_path, **options)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"tag": "other"}, "one cell tagged 'parameters', it has 0"),
        ({"parameters": 'profile = "smoke"\nseed: int = 0'}, "lacks parameter 'output'"),
        ({"parameters": "%matplotlib inline"}, "not plain Python"),
    ],
)
def test_a_notebook_that_cannot_take_parameters_is_refused(tmp_path, changes, complaint):
    write_notebook(tmp_path / "nb", "01_rows", RESULT, **changes)
    with pytest.raises(ReproduceError, match=complaint):
        run(tmp_path)


def test_no_notebooks_is_refused(tmp_path):
    with pytest.raises(ReproduceError, match="no notebooks"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("cells", "complaint"),
    [
        (["raise ValueError('first\\n  second')", "2 + 2"], r"cell \[4\]: ValueError: first second$"),
        (["import sys; sys.exit(0)", "2 + 2"], "sys.exit"),
        (["import sys; sys.exit(0)"], "sys.exit"),
        (["import os; os._exit(0)", "2 + 2"], "died .* begins 'import os; os._exit"),
        (["import os, signal; os.kill(os.getpid(), signal.SIGKILL)"], "died"),
    ],
)
def test_a_failure_is_told_in_one_line_and_leaves_no_result(tmp_path, cells, complaint):
    write_notebook(tmp_path / "nb", "01_rows", RESULT, *cells)
    [failed] = run(tmp_path)
    assert failed.status == "failed"
    assert re.search(complaint, failed.error)
    assert "\n" not in failed.error
    assert failed.notebook == tmp_path / "runs/smoke/01_rows.failed.ipynb"
    assert failed.notebook.exists()
    assert not (tmp_path / "runs/smoke/01_rows.ipynb").exists()
    assert "01_rows.failed.html" in (tmp_path / "runs/smoke/index.html").read_text()


def test_a_failing_notebook_does_not_stop_the_others(tmp_path):
    write_notebook(tmp_path / "nb", "01_fails", "1 / 0")
    write_notebook(tmp_path / "nb", "02_rows", RESULT)
    assert [r.status for r in run(tmp_path, jobs=2)] == ["failed", "ran"]
    assert [r.status for r in run(tmp_path, jobs=2)] == ["failed", "cached"], "a failure is run again"
    write_notebook(tmp_path / "nb", "01_fails", "1 / 1")
    assert [r.status for r in run(tmp_path, jobs=2)] == ["ran", "cached"]
    assert not (tmp_path / "runs/smoke/01_fails.failed.ipynb").exists()


def write_claim(folder: Path, check: str) -> None:
    claim = {"id": "C1.a", "statement": "error < bound", "source": "ours", "notebook": "01_line", "check": check}
    lines = [f"{key} = {json.dumps(value)}" for key, value in claim.items()]
    (folder / "claims.toml").write_text("\n".join(["[[claim]]", *lines]) + "\n")


def test_a_changed_check_of_its_own_makes_a_notebook_run_again(tmp_path):
    for name in ("01_line", "02_rows"):
        write_notebook(tmp_path / "nb", name, RESULT)
    write_claim(tmp_path / "nb", "value < 0.2")
    assert [r.status for r in run(tmp_path, jobs=2)] == ["ran", "ran"]
    write_claim(tmp_path / "nb", "value < 0.1")
    assert [r.status for r in run(tmp_path, jobs=2)] == ["ran", "cached"]


def test_the_index_lists_every_notebook_with_working_relative_links(tmp_path):
    keep = """\
import matplotlib.pyplot as plt
from clairlib.reproduce.notebook import start
notebook = start(profile=profile, seed=seed, output=output)
figure, axes = plt.subplots()
axes.plot([1, 2])
notebook.show_and_save("line", figure)
notebook.record("gain", 0.25)
notebook.check("C1.a", 0.1)"""
    write_notebook(tmp_path / "nb", "01_line", keep)
    write_claim(tmp_path / "nb", "value < 0.2")
    write_notebook(tmp_path / "nb", "02_rows", RESULT)
    run(tmp_path, notebooks=["01_line.ipynb"])
    folder = tmp_path / "runs/smoke"
    page = (folder / "index.html").read_text()
    links = [part.split('"')[0] for key in ('href="', 'src="') for part in page.split(key)[1:]]
    assert {"01_line.html", "01_line.ipynb", "01_line/line.pdf", "01_line/line.png"} <= set(links)
    assert all((folder / link).is_file() for link in links)
    assert "C1.a" in page and "error &lt; bound" in page and "gain = 0.25" in page
    assert "Not run at this profile" in page, "02_rows has not been run yet"
    run(tmp_path, notebooks=["02_rows"])
    assert "01_line/line.png" in (folder / "index.html").read_text(), "an earlier result stays in the index"


def test_figures_and_tables_are_published_and_nothing_else(tmp_path):
    extra = 'Path(output, "weights.safetensors").touch(); Path(output, "cache").mkdir()'
    write_notebook(tmp_path / "nb", "01_rows", RESULT, extra)
    (tmp_path / "nb/profiles.toml").write_text("[paper.01_rows]\nsize = 5\n")
    options = {"profile": "paper", "figures": tmp_path / "figures"}
    run(tmp_path, **options)
    assert [p.name for p in (tmp_path / "figures/01_rows").iterdir()] == ["rows.csv"]
    (tmp_path / "figures/01_rows/rows.csv").unlink()
    assert run(tmp_path, **options)[0].status == "cached"
    assert (tmp_path / "figures/01_rows/rows.csv").read_text().endswith("4"), "published from a cached run"


SLOW = """\
import signal
Path(output, "half.csv").write_text("half")
Path(output, "marker").mkdir()  # fails when an earlier run left it
reached = Path(output).parent / "reached"
if reached.exists():  # the run to be interrupted
    with reached.open("w") as file:
        print("half way", file=file)
    while True:
        signal.pause()  # Ctrl-C in the kernel is no end of the run
Path(output, "half.csv").write_text("whole")"""


def start_reproduce(tmp_path: Path, runs: str) -> subprocess.Popen:
    code = (
        "import sys; from pathlib import Path; from clairlib.reproduce.run import reproduce\n"
        "reproduce(source=Path(sys.argv[1]), output=Path(sys.argv[2]))"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "nb"), str(tmp_path / runs)]
    # a shell that starts the tests in the background has them ignore Ctrl-C
    listen = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(arguments, cwd=ROOT, preexec_fn=listen, **pipes)


def digests(folder: Path) -> dict[str, str]:
    """Everything a notebook wrote, and the source and outputs of the executed notebooks."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.parent != folder and path.is_file():
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in folder.glob("*.ipynb"):
        cells = [(c.source, c.get("outputs")) for c in nbformat.read(path, as_version=4).cells]
        found[path.name] = json.dumps(cells).replace(str(folder), "FOLDER")
    return found


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_resuming_after_an_interruption_equals_an_uninterrupted_run(tmp_path, blow):
    write_notebook(tmp_path / "nb", "01_rows", RESULT, "rows")
    write_notebook(tmp_path / "nb", "02_slow", RESULT, SLOW, "rows")
    folder = tmp_path / "runs/smoke"
    folder.mkdir(parents=True)
    reached = Signals(folder / "reached")
    process = start_reproduce(tmp_path, "runs")
    assert reached.next(process) == "half way"
    assert (folder / "01_rows.run.json").exists() and (folder / "02_slow/half.csv").read_text() == "half"
    kernels = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(blow)
    process.communicate(timeout=HANG_SECONDS)
    assert process.returncode != 0
    assert not (folder / "02_slow.ipynb").exists()
    _, alive = psutil.wait_procs(kernels, HANG_SECONDS)
    assert not alive, "a kernel outlived the run"
    reached.path.unlink()

    first, second = run(tmp_path, jobs=2)
    assert (first.status, second.status) == ("cached", "ran")
    whole = run(tmp_path, jobs=2, output=tmp_path / "whole")
    assert [r.status for r in whole] == ["ran", "ran"]
    assert digests(folder) == digests(tmp_path / "whole/smoke")
    assert (folder / "02_slow/half.csv").read_text() == "whole"


def test_every_profile_fits_the_notebooks_it_names():
    if not list((ROOT / "notebooks").glob("*.ipynb")):
        pytest.skip("no notebooks yet")
    for profile in ("smoke", "paper", "full"):
        assert plan(None, profile, ROOT / "notebooks", Path("unused"))


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")))
def test_notebook_runs_at_the_smoke_profile(tmp_path, name):
    [result] = reproduce([name], source=ROOT / "notebooks", output=tmp_path, progress=False)
    assert result.status == "ran", result.error
    log = json.loads((result.output / "claims.json").read_text())
    assert log["claims"] or log["records"], "a notebook measures something"
    assert all(claim["holds"] for claim in log["claims"].values())
    assert os.listdir(result.output) != ["claims.json"], "a notebook shows and keeps a figure or a table"
