"""``clair bench``: benchmarks of the solvers, the trainer and alignment against alternatives and lower bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from clairlib.cli.console import print_table, progress, quiet_libraries, stop
from clairlib.cli.options import Device, DeviceOption, Model

bench = typer.Typer(help="Measure the solvers, the trainer and alignment.", no_args_is_help=True)


@bench.command()
def convex(
    instances: Annotated[int, Option(min=1, help="Number of small planted instances.")] = 20,
    seed: Annotated[int, Option(help="Seed of the instances.")] = 0,
) -> None:
    """Time the convex solver against cvxpy + SCS at equal objective, instance by instance."""
    from clairlib.bench.convex import convex as run
    from clairlib.bench.convex import speed_ratio
    from clairlib.core.seeds import derive

    try:
        rows = run(instances=instances, generator=derive(seed, "bench", "convex"))
    except ModuleNotFoundError as error:
        stop(error)
    columns = ["p", "K", "q", "nu", "ours_seconds", "cvxpy_seconds", "scs_seconds", "ours_error", "scs_error"]
    columns += ["speed", "speed_solver"]
    print_table(columns, ([row[column] for column in columns] for row in rows))
    whole, solver = speed_ratio(rows), speed_ratio(rows, "speed_solver")
    typer.echo(f"median speed ratio: {whole:.3g} to cvxpy + SCS, {solver:.3g} to SCS alone")


@bench.command()
def training(
    clients: Annotated[list[int] | None, Option(min=1, help="Number of clients; repeatable.")] = None,
    tokens: Annotated[list[int] | None, Option(min=2, help="Tokens of a client's batch; repeatable.")] = None,
    full: Annotated[bool, Option("--full", help="The whole table; about an hour on one CPU thread.")] = False,
    repeats: Annotated[int, Option(min=1, help="Timed runs of each side; the best one counts.")] = 2,
    device: DeviceOption = Device.cpu,
    seed: Annotated[int, Option(help="Seed of weights, data and initial factors.")] = 0,
    output: Annotated[
        Path | None, Option(metavar="STEM", help="Write the table to STEM.csv, with provenance to STEM.json.")
    ] = None,
) -> None:
    """Time the batched trainer against sequential peft, side by side, at equal losses; on the CPU with one thread.

    A rate is clients x steps / second, from set-up to the last step. Speed is the ratio of the two rates. mb is the
    peak of memory in addition to the model. Floor is a lower bound: the time of the matrix products that training
    cannot avoid, at the speed measured on this machine.
    """
    from clairlib.bench.cases import EXPLANATION, cases
    from clairlib.bench.training import SHOWN, measure, write

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
    print_table(SHOWN, ([row[name] for name in SHOWN] for row in rows))
    typer.echo(EXPLANATION)


@bench.command()
def align(
    folder: Annotated[
        Path | None, Argument(metavar="CLIENTS_DIR", help="Adapter folders; default: planted adapters.")
    ] = None,
    clients: Annotated[int, Option(min=3, help="Planted clients, an eighth of them contaminated.")] = 64,
    rank: Annotated[int, Option(min=5, help="Rank of the planted adapters.")] = 16,
    model: Annotated[Model, Option(help="Model with the planted shapes.")] = Model.llama,
    layers: Annotated[int, Option(min=1, help="Layers with planted adapters; 32 layers are 5.1 GB.")] = 4,
    jobs: Annotated[str, Option(help="Numbers of processes, with commas between them.")] = "1,2",
    scratch: Annotated[Path | None, Option(help="Folder for temporary files; default: the system's.")] = None,
    csv: Annotated[Path | None, Option(help="Also write the table to this file.")] = None,
    seed: Annotated[int, Option(help="Seed of the planted clients.")] = 0,
) -> None:
    """Time `clair align` against a lower bound, reading and Gram products, and against the dense route."""
    from clairlib.bench.alignment import EXPLANATION, measure, measure_planted
    from clairlib.core.files import AdapterError
    from clairlib.simulate import Plan

    try:
        counts = [int(count) for count in jobs.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise typer.BadParameter(f"must be whole numbers >= 1, with commas, got {jobs!r}", param_hint="--jobs")
    try:
        if folder is not None:
            table = measure(folder, scratch=scratch, jobs=counts)
        else:
            plan = Plan(clients=clients, rank=rank, contaminated=clients // 8, seed=seed)
            table = measure_planted(plan, scratch=scratch, jobs=counts, model=model.value, layers=layers)
        if csv is not None:
            table.to_csv(csv, index=False)
    except (AdapterError, OSError) as error:
        stop(error)
    numbers = table.drop(columns="contaminated")
    print_table(numbers, numbers.itertuples(index=False))
    typer.echo(EXPLANATION)
