"""``clair bench``: the convex solver against cvxpy, the batched trainer against one client after the other."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from clairlib.console import console, progress, quiet_libraries, show, stop

bench = typer.Typer(help="Measure the solvers and the trainer.", no_args_is_help=True)


class Device(StrEnum):
    cpu = "cpu"
    cuda = "cuda"


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
        stop(error)
    columns = ["p", "K", "q", "nu", "ours_seconds", "cvxpy_seconds", "scs_seconds", "ours_error", "scs_error"]
    columns += ["speed", "speed_solver"]
    table = Table(*(column.replace("_", " ") for column in columns))
    for row in rows:
        table.add_row(*(show(row[column]) for column in columns))
    console().print(table)
    whole, solver = speed_ratio(rows), speed_ratio(rows, "speed_solver")
    typer.echo(f"median speed ratio: {whole:.3g} to cvxpy + SCS, {solver:.3g} to SCS alone")


@bench.command()
def training(
    clients: Annotated[list[int] | None, typer.Option(min=1, help="Clients; may be given several times.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=2, help="Tokens of a client's batch; likewise.")] = None,
    full: Annotated[bool, typer.Option("--full", help="The whole table; about an hour on one CPU thread.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each side, of which the best counts.")] = 2,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.cpu,
    seed: Annotated[int, typer.Option(help="Seed of weights, data and initial factors.")] = 0,
    output: Annotated[
        Path | None, typer.Option(metavar="STEM", help="Write the table to STEM.csv, with provenance to STEM.json.")
    ] = None,
) -> None:
    """Time the batched trainer against sequential peft, side by side, at equal losses; on the CPU on one thread.

    Rates are clients x steps / second from set-up to the last step, speed is their ratio, mb is the peak of memory
    beside the model. Floor: the needed matrix products at this machine's own measured speed.
    """
    from clairlib.bench_cases import EXPLANATION, cases
    from clairlib.bench_training import SHOWN, measure, write

    quiet_libraries()
    try:
        chosen = cases(clients, tokens, full=full)
        with progress("cases") as bar:
            rows = []
            for case in chosen:
                rows.append(measure(case, repeats=repeats, device=device.value, seed=seed))
                bar(advance=1, total=len(chosen))
        if output is not None:
            write(rows, output)
    except (ValueError, OSError) as error:
        stop(error)
    table = Table(*(name.replace("_", " ") for name in SHOWN))
    for row in rows:
        values = (row[name] for name in SHOWN)
        table.add_row(*(str(value) if isinstance(value, str | int) else show(value) for value in values))
    console().print(table)
    typer.echo(EXPLANATION)
