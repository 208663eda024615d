"""The ``clair`` command: train clients, align their adapters, reproduce the notebooks, run benchmarks."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from typer import Argument, Option

from clairlib.cli.bench import bench
from clairlib.cli.console import print_table, progress, quiet_libraries, show, stop, terminable
from clairlib.cli.options import Device, DeviceOption, OutputOption, OverwriteFlag, QuietFlag
from clairlib.cli.synth import synth

if TYPE_CHECKING:  # torch is imported inside the commands, so that --help answers at once
    from clairlib.recovery.result import ClairResult

app = typer.Typer(name="clair", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(bench, name="bench")

Solver = StrEnum("Solver", ["consensus", "convex"])
Side = StrEnum("Side", ["output", "input"])
Profile = StrEnum("Profile", ["smoke", "paper", "full"])


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"clair {version('clairlib')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Find contaminated federated LoRA clients and refine the others (CLAIR)."""


@app.command()
def align(
    clients: Annotated[
        list[Path], Argument(metavar="CLIENT_DIR", help="PEFT adapter folders, or one folder that holds them.")
    ],
    output: OutputOption,
    rank: Annotated[int | None, Option(help="Shared subspace rank; default: estimated per module.")] = None,
    adapter_rank: Annotated[
        int | None, Option(help="Rank of the written adapters; default: each client's own.")
    ] = None,
    solver: Annotated[Solver, Option(help="Solver that finds the subspace.")] = Solver.consensus,
    device: DeviceOption = Device.cpu,
    side: Annotated[Side, Option(help="Side of the updates that shares a subspace.")] = Side.output,
    seed: Annotated[int, Option(help="Seed of the randomised steps.")] = 0,
    trusted: Annotated[
        list[str] | None, Option(metavar="NAME", help="Client known to be honest; its group is benign. Repeatable.")
    ] = None,
    keep_contaminated: Annotated[
        bool, Option("--keep-contaminated", help="Copy contaminated clients' adapters unchanged.")
    ] = False,
    overwrite: OverwriteFlag = False,
    resume: Annotated[bool, Option("--resume", help="Go on from an unfinished run.")] = False,
    jobs: Annotated[int, Option(min=1, help="Number of processes.")] = 1,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Check the input, print the expected memory and time, write nothing.")
    ] = False,
    quiet: QuietFlag = False,
) -> None:
    """Judge the clients' LoRA adapters, refine the benign ones and write them with a report."""
    from clairlib.alignment.align import align as run
    from clairlib.alignment.align import open_job
    from clairlib.alignment.forecast import forecast
    from clairlib.core.files import AdapterError

    method: dict[str, Any] = {"rank": rank, "solver": solver.value, "side": side.value, "seed": seed}
    method |= {"adapter_rank": adapter_rank, "device": device.value}
    try:
        if dry_run:
            typer.echo(str(forecast(open_job(clients, **method), jobs)))
            return
        with terminable(), progress("reading adapters", quiet=quiet) as bar:
            alignment = run(
                clients, output, **method, trusted=trusted, keep_contaminated=keep_contaminated, overwrite=overwrite,
                resume=resume, jobs=jobs, draw=save_overview,
                progress=lambda module, total: bar(advance=1, total=total, description=module),
            )  # fmt: skip
    except AdapterError as error:
        stop(error)
    if not quiet:
        _print_alignment(alignment.report, output)
        for line in alignment.result.remarks():
            typer.echo(line)
        if not alignment.result.is_shared:
            typer.echo("Nothing shared found: the updates do not predict one another. Nothing can be told.")


@app.command()
def train(
    clients: Annotated[
        Path, Argument(metavar="CLIENTS_DIR", help="Folder that holds a folder or a .jsonl file per client.")
    ],
    model: Annotated[str, Option(help="Base model: a folder, or a name on the Hugging Face hub.")],
    output: OutputOption,
    targets: Annotated[
        str, Option(help="Ends of the adapted modules' names, with commas between them; or all-linear.")
    ] = "o_proj,down_proj",
    rank: Annotated[int, Option(min=1, help="Rank of the adapters.")] = 8,
    alpha: Annotated[float, Option(help="Scale of the adapters times their rank (LoRA alpha).")] = 16.0,
    rslora: Annotated[bool, Option("--rslora", help="Scale is alpha / sqrt(rank).")] = False,
    epochs: Annotated[
        int | None, Option(min=1, help="Passes over a client's examples; default: 3, or no limit with --steps.")
    ] = None,
    steps: Annotated[int | None, Option(min=1, help="Most optimiser steps per client.")] = None,
    batch: Annotated[int, Option(min=1, help="Examples per step.")] = 8,
    learning_rate: Annotated[float, Option(min=0.0, help="AdamW's learning rate.")] = 2e-4,
    max_length: Annotated[
        int | None, Option(min=2, help="Most tokens of an example; default: 512, or the model's limit if lower.")
    ] = None,
    validation: Annotated[
        float, Option(help="Fraction of a client's examples held out; the best adapter on them is kept.")
    ] = 0.2,
    group_tokens: Annotated[
        int, Option(min=1, help="Most tokens that go through the model together; fewer take less memory.")
    ] = 4096,
    device: DeviceOption = Device.cpu,
    bf16: Annotated[bool, Option("--bf16", help="Products in bfloat16, on CUDA only.")] = False,
    seed: Annotated[int, Option(help="Seed of initial factors, order and held-out examples.")] = 0,
    resume: Annotated[bool, Option("--resume", help="Go on from an interrupted run.")] = False,
    overwrite: OverwriteFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Train a LoRA adapter for every client, all at once, on one frozen base model; `clair align` takes the output.

    A line of data is {"text": ...}, {"prompt": ..., "completion": ...} (only
    the completion is learnt) or {"messages": [...]} (only the last message is
    learnt). For a sequence classifier it is {"text": ..., "label": ...}.
    """
    from clairlib.training.finetune import Settings, finetune

    settings = Settings(
        targets=targets if targets == "all-linear" else targets.split(","), rank=rank, alpha=alpha, use_rslora=rslora,
        epochs=3 if epochs is None and steps is None else epochs, steps=steps, batch=batch,
        learning_rate=learning_rate, validation=validation, max_length=max_length, group_tokens=group_tokens,
        device=device.value, bf16=bf16, seed=seed,
    )  # fmt: skip
    quiet_libraries()
    try:
        with terminable(), progress("reading model and data", quiet=quiet) as bar:
            done = finetune(
                clients, model, output, settings, resume=resume, overwrite=overwrite,
                announce=None if quiet else typer.echo,
                progress=lambda steps, total: bar(completed=steps, total=total, description="training"),
            )  # fmt: skip
    except (ValueError, OSError) as error:
        stop(error)
    if not quiet:
        _print_training(done.report, output)


@app.command()
def reproduce(
    notebooks: Annotated[list[str] | None, Argument(metavar="NOTEBOOK", help="Notebooks to run; default: all.")] = None,
    profile: Annotated[Profile, Option(help="Size of the experiments.")] = Profile.smoke,
    jobs: Annotated[int, Option(min=1, help="Number of notebooks that run at a time.")] = 1,
    force: Annotated[bool, Option("--force", help="Also run notebooks that are up to date.")] = False,
) -> None:
    """Run the notebooks in ./notebooks through papermill and write a report into ./runs.

    The paper profile also publishes figures and tables into ./figures.
    """
    from clairlib.reproduce.run import ReproduceError
    from clairlib.reproduce.run import reproduce as run

    try:
        runs = run(
            notebooks or None, profile=profile.value, jobs=jobs, force=force, source=Path("notebooks"),
            output=Path("runs"), figures=Path("figures") if profile is Profile.paper else None, progress=True,
        )  # fmt: skip
    except ReproduceError as error:
        stop(error)
    if any(notebook.status == "failed" for notebook in runs):
        raise typer.Exit(1)


@app.command()
def report(
    strict: Annotated[bool, Option("--strict", help="Refuse results that are not of today's code.")] = False,
) -> None:
    """Write figures/claims.json and the table of docs/claims.md from what the notebooks measured.

    A result of a tree with changes, of a commit that is no ancestor of today's, or of other code than its notebook has
    today is marked stale, and the notebooks to run again are named.
    """
    from clairlib.reproduce.claims import LedgerError, write_report

    try:
        entries = write_report(Path("."), strict=strict)
    except (LedgerError, OSError) as error:
        stop(error)
    holding, stale = sum(bool(entry["holds"]) for entry in entries), [e["notebook"] for e in entries if e["stale"]]
    typer.echo(f"{holding} of {len(entries)} claims hold; written to figures/claims.json and docs/claims.md")
    if stale:
        again = " ".join(dict.fromkeys(stale))
        typer.echo(f"{len(stale)} results are stale; run: clair reproduce {again} --profile paper")


app.command()(synth)


def save_overview(result: ClairResult, path: Path) -> None:
    """Write the overview of a result as PNG, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from clairlib.plots import overview

    figure = overview(result)
    try:
        figure.savefig(path, dpi=150)
    finally:
        plt.close(figure)


COLOURS = {"benign": "green", "contaminated": "red", "cannot tell": "yellow"}


def _print_alignment(report: dict[str, Any], output: Path) -> None:
    verdicts = []
    told = [client["verdict"] for client in report["clients"]]
    for client, verdict in zip(report["clients"], told, strict=True):
        shown = f"[{COLOURS[verdict]}]{verdict}[/]"
        own = [client[key] for key in ("score", "p_value", "smallest_deviation")]
        verdicts.append([escape(client["name"]), shown, *own])
    print_table(["client", "verdict", "score", "p-value", "seen from (own size)"], verdicts)
    details = []
    for module in report["modules"]:
        shape, error = " x ".join(map(str, module["shape"])), module["truncation_error"]
        refined = "yes" if module["refined"] else "no, own updates kept"
        numbers = [module["rank"], module["shared_structure"], module["estimated_gain"]]
        errors = f"{show(error['max'])} (mean {show(error['mean'])})"
        details.append([escape(module["name"]), shape, *numbers, refined, errors])
    columns = ["module", "shape", "rank", "shared structure", "estimated gain", "refined", "truncation error"]
    print_table(columns, details)
    counts = ", ".join(f"{told.count(verdict)} {verdict}" for verdict in COLOURS if verdict in told)
    typer.echo(f"{counts}; written to {output}")


def _print_training(report: dict[str, Any], output: Path) -> None:
    rows, diverged = [], []
    for client in report["clients"]:
        status, kept = "[green]trained[/green]", client["best_step"] or client["steps"]
        if client["status"] == "diverged":
            status, kept = f"[red]diverged at step {client['diverged_at']}[/red]", None
            diverged.append(client["name"])
        counts = [client["examples"], client["cut_off"], client["steps"], kept]
        rows.append([escape(client["name"]), status, *counts, client["losses"][0], client["losses"][-1]])
    print_table(["client", "status", "examples", "cut off", "steps", "kept at step", "first loss", "last loss"], rows)
    typer.echo(f"{len(rows) - len(diverged)} adapters written to {output}")
    if diverged:
        typer.echo(f"clair: no adapter for {', '.join(map(repr, diverged))}: the loss diverged", err=True)
