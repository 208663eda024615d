"""Run the notebooks through papermill: parameters checked first, resumable, parallel, with a report.

A run leaves in ``output/profile``: NAME.ipynb and NAME.html (executed), NAME/ (its figures and tables), NAME.run.json
(stamp and outcome, written last) and index.html. What an interrupted run left is never taken for a result, as it has no
record with the stamp.
"""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nbformat
import papermill
import psutil
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillException, PapermillExecutionError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from traitlets.config import Config

from clairlib.core import provenance
from clairlib.reproduce import report
from clairlib.reproduce.claims import write_text
from clairlib.reproduce.profiles import DEFAULT_PROFILE, NotebookJob, ReproduceError, plan

PUBLISHED = {".pdf", ".png", ".csv", ".json"}
QUIET = Config({"KernelManager": {"transport_encryption": "auto"}})  # or every kernel start warns


@dataclass(frozen=True)
class NotebookRun:
    """Outcome of a notebook: ``notebook`` is the executed file, ``output`` the folder of its figures and tables."""

    name: str
    status: Literal["ran", "cached", "failed"]
    seconds: float
    notebook: Path
    output: Path
    error: str | None = None

    def __str__(self) -> str:
        error = f"\n        {self.error}" if self.error else ""
        return f"{self.status:>6}  {self.name}  {self.seconds:.1f} s{error}"


def reproduce(
    notebooks: list[str] | None = None,
    *,
    profile: str = DEFAULT_PROFILE,
    jobs: int = 1,
    source: Path = Path("notebooks"),
    output: Path = Path("runs"),
    figures: Path | None = None,
    progress: bool = True,
    force: bool = False,
) -> list[NotebookRun]:
    """Run notebooks (all of ``source`` by default) at a profile, ``jobs`` at a time, and write index.html.

    The profile's parameters are in ``source/profiles.toml``, table [PROFILE.NAME]. A notebook is skipped, unless
    ``force``, if its stamp holds: the sha256 of its cells, parameters and claims, of the code of this project that it
    imports, and of the versions under it. Its folder ``output/profile/NAME`` is emptied before it starts. With
    ``figures``, the pdf, png, csv and json files it leaves there are copied to ``figures/NAME``. Ctrl-C stops the
    kernels; a second run goes on with the notebooks that are not finished.

    Returns
    -------
    list of NotebookRun
        In the order asked for. A failing notebook does not stop the others.

    Raises
    ------
    ReproduceError
        Unknown notebook, profile or parameter, or a notebook that takes no parameters. Nothing has been run.
    """
    if jobs < 1:
        raise ReproduceError(f"jobs must be at least 1, got {jobs}")
    source, folder = Path(source).resolve(), Path(output).resolve() / profile
    work = plan(notebooks, profile, source, folder)
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(quiet=not progress)
    runs = _run_all(work, jobs, force, figures, console)
    index = report.write_index(folder, sorted(path.stem for path in source.glob("*.ipynb")), profile)
    console.print(f"Report: {index}", highlight=False, markup=False, soft_wrap=True)
    return runs


def _run_all(
    work: list[NotebookJob], jobs: int, force: bool, figures: Path | None, console: Console
) -> list[NotebookRun]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with bar, ThreadPoolExecutor(jobs) as pool:
        task = bar.add_task("notebooks", total=len(work))
        futures = [pool.submit(_run, job, force, figures) for job in work]
        try:
            for done in as_completed(futures):
                bar.advance(task)
                console.print(str(done.result()), highlight=False, markup=False, soft_wrap=True)
        except BaseException:  # Ctrl-C above all: the threads wait for their kernels, so stop those
            pool.shutdown(wait=False, cancel_futures=True)
            _stop_kernels(futures)
            raise
    return [future.result() for future in futures]


def _stop_kernels(futures: list[Future[NotebookRun]]) -> None:
    """Kill this process's notebook kernels until no notebook is running."""
    while not all(future.done() for future in futures):
        for child in psutil.Process().children(recursive=True):
            try:
                if "ipykernel_launcher" in child.cmdline():
                    child.kill()
            except psutil.Error:  # gone already
                continue
        time.sleep(0.1)


def _run(job: NotebookJob, force: bool, figures: Path | None) -> NotebookRun:
    earlier = report.read_record(job.file("run.json"))
    holds = not force and earlier.get("stamp") == job.stamp
    if holds and all((job.folder / name).exists() for name in earlier["files"]):  # nothing was deleted since
        run = NotebookRun(job.name, "cached", earlier["seconds"], job.file("ipynb"), job.results)
    else:
        run = _run_afresh(job)
    if figures is not None and run.status != "failed":
        _publish(job.results, Path(figures) / job.name)
    return run


def _run_afresh(job: NotebookJob) -> NotebookRun:
    for ending in ("run.json", "ipynb", "html", "failed.ipynb", "failed.html", "partial.ipynb"):
        job.file(ending).unlink(missing_ok=True)
    shutil.rmtree(job.results, ignore_errors=True)
    job.results.mkdir(parents=True)
    began = time.perf_counter()
    error = _execute(job)
    seconds = round(time.perf_counter() - began, 2)
    kind = "" if error is None else "failed."
    final, page = job.file(f"{kind}ipynb"), job.file(f"{kind}html")
    if job.file("partial.ipynb").exists():  # not when the kernel did not even start
        report.write_page(job.file("partial.ipynb"), page, job.name)
        job.file("partial.ipynb").rename(final)
    files = [final, page, *sorted(path for path in job.results.rglob("*") if path.is_file())]
    made = [path.relative_to(job.folder).as_posix() for path in files if path.exists()]
    parameters = {key: value for key, value in job.parameters.items() if key != "output"}
    record: dict[str, Any] = {"stamp": job.stamp if error is None else None, "seconds": seconds, "error": error}
    record |= {"files": made, "provenance": provenance.collect(parameters=parameters)}
    write_text(job.file("run.json"), json.dumps(record, indent=1) + "\n")  # last: only now does the stamp hold
    return NotebookRun(job.name, "ran" if error is None else "failed", seconds, final, job.results, error)


def _execute(job: NotebookJob) -> str | None:
    """Run the notebook in its own folder, as JupyterLab does; return what went wrong in one line, or None."""
    try:
        executed = papermill.execute_notebook(
            str(job.source), str(job.file("partial.ipynb")), parameters=job.parameters, kernel_name="python3",
            language="python", progress_bar=False, config=QUIET,
            resources={"metadata": {"path": str(job.source.parent)}},  # papermill's cwd moves all threads
        )  # fmt: skip
    except PapermillExecutionError as error:
        return _one_line(f"cell [{error.exec_count}]: {error.ename}: {error.evalue}")
    except DeadKernelError:
        return f"the kernel died (killed, or out of memory?) in {_last_started(job.file('partial.ipynb'))}"
    except (PapermillException, RuntimeError, OSError) as error:  # the kernel did not start, the disk is full
        return _one_line(f"{type(error).__name__}: {error}")
    return _first_unfinished(executed)


def _first_unfinished(notebook: nbformat.NotebookNode) -> str | None:
    """Say where a run ended early, or None. After sys.exit, which raises nothing, papermill calls a run complete."""
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.source.strip() and cell.execution_count is None:
            return f"ended before {_name(cell)}"
        if any(out.output_type == "error" and out.ename == "SystemExit" for out in cell.get("outputs", [])):
            return f"cell [{cell.execution_count}] leaves the notebook with sys.exit"
    return None


def _last_started(path: Path) -> str:
    """Name the cell that a dead kernel was in. Papermill calls it completed, but later ones have no start time."""
    cells = nbformat.read(path, as_version=4).cells
    started = [cell for cell in cells if cell.metadata.get("papermill", {}).get("start_time")]
    return _name(started[-1]) if started else "no cell at all"


def _name(cell: nbformat.NotebookNode) -> str:
    return _one_line(f"the cell that begins {cell.source.strip().splitlines()[0]!r}")


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 500 else line[:497] + "..."


def _publish(results: Path, target: Path) -> None:
    """Copy figures and tables; the target is replaced only when the copy is whole."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for path in results.iterdir():
        if path.is_file() and path.suffix in PUBLISHED:
            shutil.copyfile(path, partial / path.name)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
