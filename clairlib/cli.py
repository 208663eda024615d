"""The ``clair`` command: align adapters, reproduce the notebooks, compare the convex solver with cvxpy."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:  # torch and what builds on it load inside the commands, so that --help answers at once
    from clairlib.result import ClairResult

app = typer.Typer(
    name="clair",
    help="Find contaminated federated LoRA clients and refine the others (CLAIR).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Measure the solvers.", no_args_is_help=True)
app.add_typer(bench, name="bench")


class Solver(StrEnum):
    consensus = "consensus"
    convex = "convex"


class Side(StrEnum):
    output = "output"
    input = "input"


class Device(StrEnum):
    cpu = "cpu"
    cuda = "cuda"


class Profile(StrEnum):
    smoke = "smoke"
    paper = "paper"
    full = "full"


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"clair {version('clairlib')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Find contaminated federated LoRA clients and refine the others (CLAIR)."""


@app.command()
def align(
    clients: Annotated[
        list[Path],
        typer.Argument(metavar="CLIENT_DIR", help="PEFT adapter folders, or one parent folder of them."),
    ],
    output: Annotated[Path, typer.Option(help="Folder to write; it appears whole or not at all.")],
    rank: Annotated[int | None, typer.Option(help="Shared rank; default: estimated per module.")] = None,
    adapter_rank: Annotated[
        int | None, typer.Option(help="Rank of the adapters written; default: each client's own.")
    ] = None,
    solver: Annotated[Solver, typer.Option(help="How the shared subspace is found.")] = Solver.consensus,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.cpu,
    side: Annotated[Side, typer.Option(help="Side of the updates that shares a subspace.")] = Side.output,
    seed: Annotated[int, typer.Option(help="Seed of the randomised steps.")] = 0,
    keep_contaminated: Annotated[
        bool, typer.Option("--keep-contaminated", help="Copy contaminated clients' adapters unchanged.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output folder of an earlier run.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Judge the clients' LoRA adapters, refine the benign ones and write them with a report."""
    from clairlib.alignment import align as run
    from clairlib.folders import AdapterError

    try:
        with _terminable(), _progress(quiet) as progress:
            alignment = run(
                clients,
                output,
                rank=rank,
                adapter_rank=adapter_rank,
                solver=solver.value,
                side=side.value,
                device=device.value,
                seed=seed,
                keep_contaminated=keep_contaminated,
                overwrite=overwrite,
                progress=progress,
                draw=_save_overview,
            )
    except AdapterError as error:
        _stop(error)
    if not quiet:
        _print_alignment(alignment.report, output)
        if not alignment.result.has_shared_subspace:
            typer.echo("No shared subspace found: the updates do not predict one another. The verdict says little.")


@app.command()
def reproduce(
    notebooks: Annotated[
        list[str] | None, typer.Argument(metavar="NOTEBOOK", help="Notebooks to run; default: all.")
    ] = None,
    profile: Annotated[Profile, typer.Option(help="Size of the experiments.")] = Profile.smoke,
    jobs: Annotated[int, typer.Option(min=1, help="Notebooks run at a time.")] = 1,
    force: Annotated[bool, typer.Option("--force", help="Run again what is up to date.")] = False,
) -> None:
    """Run the notebooks in ./notebooks through papermill and write a report into ./runs.

    The paper profile also publishes figures and tables into ./figures.
    """
    from clairlib.reproduce import ReproduceError
    from clairlib.reproduce import reproduce as run

    try:
        runs = run(
            notebooks or None,
            profile=profile.value,
            jobs=jobs,
            force=force,
            source=Path("notebooks"),
            output=Path("runs"),
            figures=Path("figures") if profile is Profile.paper else None,
            progress=True,
        )
    except ReproduceError as error:
        _stop(error)
    if any(notebook.status == "failed" for notebook in runs):
        raise typer.Exit(1)


@app.command()
def report() -> None:
    """Write figures/claims.json and the claims table of README.md from what the notebooks measured."""
    from clairlib.ledger import LedgerError, write_report

    try:
        entries = write_report(Path("."))
    except (LedgerError, OSError) as error:
        _stop(error)
    holding = sum(entry["holds"] for entry in entries)
    typer.echo(f"{holding} of {len(entries)} claims hold; written to figures/claims.json and README.md")


@bench.command()
def convex(
    instances: Annotated[int, typer.Option(min=1, help="Number of small planted instances.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the instances.")] = 0,
) -> None:
    """Time the convex solver against cvxpy + SCS at equal objective, instance by instance."""
    from clairlib.bench import convex as run
    from clairlib.bench import speed_ratio
    from clairlib.seeds import derive

    try:
        rows = run(instances=instances, generator=derive(seed, "bench", "convex"))
    except ModuleNotFoundError as error:
        _stop(error)
    columns = ["p", "K", "q", "nu", "ours_seconds", "cvxpy_seconds", "scs_seconds", "ours_error", "scs_error"]
    columns += ["speed", "speed_solver"]
    table = Table(*(column.replace("_", " ") for column in columns))
    for row in rows:
        table.add_row(*(_show(row[column]) for column in columns))
    _console().print(table)
    whole, solver = speed_ratio(rows), speed_ratio(rows, "speed_solver")
    typer.echo(f"median speed ratio: {whole:.3g} to cvxpy + SCS, {solver:.3g} to SCS alone")


def _stop(error: Exception) -> Any:
    """End with exit code 2 and one line; whatever a hostile name smuggled into it is made printable."""
    line = "".join(c if c.isprintable() else " " for c in str(error))
    typer.echo(f"clair: {' '.join(line.split())}", err=True)
    raise typer.Exit(2)


def _save_overview(result: ClairResult, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from clairlib.plots import overview

    figure = overview(result)
    try:
        figure.savefig(path, dpi=150)
    finally:
        plt.close(figure)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM as an exception, so that what is half written is cleared away; a second one is not heard."""

    def stop(number: int, _: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, int], None]]:
    """A bar over modules on the error stream, only where somebody watches it."""
    name = TextColumn("{task.description}", markup=False)
    columns = (name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    hidden = quiet or not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden) as bar:
        task = bar.add_task("reading adapters", total=None)

        def done(module: str, total: int) -> None:
            bar.update(task, advance=1, total=total, description=module)

        yield done


def _print_alignment(report: dict[str, Any], output: Path) -> None:
    clients, modules = report["clients"], report["modules"]
    table = Table("client", "verdict", "score", "p-value")
    for client in clients:
        verdict = "[red]contaminated[/red]" if client["contaminated"] else "[green]benign[/green]"
        table.add_row(escape(client["name"]), verdict, _show(client["score"]), _show(client["p_value"]))
    detail = Table("module", "shape", "rank", "estimated gain", "refined", "truncation error")
    for module in modules:
        error = module["truncation_error"]
        detail.add_row(
            escape(module["name"]),
            " x ".join(map(str, module["shape"])),
            str(module["rank"]),
            _show(module["estimated_gain"]),
            "yes" if module["refined"] else "no, own updates kept",
            f"{_show(error['max'])} (mean {_show(error['mean'])})",
        )
    bad = sum(client["contaminated"] for client in clients)
    for printed in (table, detail):
        for column in printed.columns:
            column.overflow = "fold"  # names are never cut
        _console().print(printed)
    typer.echo(f"{len(clients) - bad} benign, {bad} contaminated; written to {output}")


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=160)  # rich would fold files and pipes at 80


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
