"""The ``clair`` command: train clients, align their adapters, reproduce the notebooks, run benchmarks."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from clairlib.cli.bench import bench
from clairlib.cli.console import console, progress, quiet_libraries, show, stop, terminable
from clairlib.cli.synth import synth

if TYPE_CHECKING:  # torch is imported inside the commands, so that --help answers at once
    from clairlib.recovery.result import ClairResult

app = typer.Typer(
    name="clair",
    help="Find contaminated federated LoRA clients and refine the others (CLAIR).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
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
        typer.Argument(metavar="CLIENT_DIR", help="PEFT adapter folders, or one folder that holds them."),
    ],
    output: Annotated[Path, typer.Option(help="Folder to write; it appears whole or not at all.")],
    rank: Annotated[int | None, typer.Option(help="Shared subspace rank; default: estimated per module.")] = None,
    adapter_rank: Annotated[
        int | None, typer.Option(help="Rank of the written adapters; default: each client's own.")
    ] = None,
    solver: Annotated[Solver, typer.Option(help="Solver that finds the subspace.")] = Solver.consensus,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.cpu,
    side: Annotated[Side, typer.Option(help="Side of the updates that shares a subspace.")] = Side.output,
    seed: Annotated[int, typer.Option(help="Seed of the randomised steps.")] = 0,
    keep_contaminated: Annotated[
        bool, typer.Option("--keep-contaminated", help="Copy contaminated clients' adapters unchanged.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output folder of an earlier run.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from an unfinished run.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Number of processes.")] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the input, print the expected memory and time, write nothing.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Judge the clients' LoRA adapters, refine the benign ones and write them with a report."""
    from clairlib.alignment.align import align as run
    from clairlib.alignment.align import open_job
    from clairlib.alignment.forecast import forecast
    from clairlib.core.files import AdapterError

    try:
        if dry_run:
            method: dict[str, Any] = {"rank": rank, "solver": solver.value, "side": side.value, "seed": seed}
            job = open_job(clients, adapter_rank=adapter_rank, device=device.value, **method)
            typer.echo(str(forecast(job, jobs)))
            return
        with terminable(), progress("reading adapters", quiet=quiet) as bar:
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
                resume=resume,
                jobs=jobs,
                progress=lambda module, total: bar(advance=1, total=total, description=module),
                draw=save_overview,
            )
    except AdapterError as error:
        stop(error)
    if not quiet:
        _print_alignment(alignment.report, output)
        if not alignment.result.has_shared_subspace:
            typer.echo("No shared subspace found: the updates do not predict one another. The verdict says little.")


@app.command()
def train(
    clients: Annotated[
        Path, typer.Argument(metavar="CLIENTS_DIR", help="Folder that holds a folder or a .jsonl file per client.")
    ],
    model: Annotated[str, typer.Option(help="Base model: a folder, or a name on the Hugging Face hub.")],
    output: Annotated[Path, typer.Option(help="Folder to write; it appears whole or not at all.")],
    targets: Annotated[
        str, typer.Option(help="Ends of the adapted modules' names, with commas between them; or all-linear.")
    ] = "o_proj,down_proj",
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 8,
    alpha: Annotated[float, typer.Option(help="Scale of the adapters times their rank (LoRA alpha).")] = 16.0,
    rslora: Annotated[bool, typer.Option("--rslora", help="Scale is alpha / sqrt(rank).")] = False,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over a client's examples; default: 3, or no limit with --steps.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Most optimiser steps per client.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Examples per step.")] = 8,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="AdamW's learning rate.")] = 2e-4,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Most tokens of an example; default: 512, or the model's limit if lower.")
    ] = None,
    validation: Annotated[
        float, typer.Option(help="Fraction of a client's examples held out; the best adapter on them is kept.")
    ] = 0.2,
    group_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens that go through the model together; fewer take less memory.")
    ] = 4096,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.cpu,
    bf16: Annotated[bool, typer.Option("--bf16", help="Products in bfloat16, on CUDA only.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of initial factors, order and held-out examples.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from an interrupted run.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output folder of an earlier run.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
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
    notebooks: Annotated[
        list[str] | None, typer.Argument(metavar="NOTEBOOK", help="Notebooks to run; default: all.")
    ] = None,
    profile: Annotated[Profile, typer.Option(help="Size of the experiments.")] = Profile.smoke,
    jobs: Annotated[int, typer.Option(min=1, help="Number of notebooks that run at a time.")] = 1,
    force: Annotated[bool, typer.Option("--force", help="Also run notebooks that are up to date.")] = False,
) -> None:
    """Run the notebooks in ./notebooks through papermill and write a report into ./runs.

    The paper profile also publishes figures and tables into ./figures.
    """
    from clairlib.reproduce.run import ReproduceError
    from clairlib.reproduce.run import reproduce as run

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
        stop(error)
    if any(notebook.status == "failed" for notebook in runs):
        raise typer.Exit(1)


@app.command()
def report(
    strict: Annotated[bool, typer.Option("--strict", help="Refuse results that are not of today's code.")] = False,
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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from clairlib.plots import overview

    figure = overview(result)
    try:
        figure.savefig(path, dpi=150)
    finally:
        plt.close(figure)


def _print_alignment(report: dict[str, Any], output: Path) -> None:
    clients, modules = report["clients"], report["modules"]
    table = Table("client", "verdict", "score", "p-value")
    for client in clients:
        verdict = "[red]contaminated[/red]" if client["contaminated"] else "[green]benign[/green]"
        table.add_row(escape(client["name"]), verdict, show(client["score"]), show(client["p_value"]))
    detail = Table("module", "shape", "rank", "shared structure", "estimated gain", "refined", "truncation error")
    for module in modules:
        error = module["truncation_error"]
        detail.add_row(
            escape(module["name"]),
            " x ".join(map(str, module["shape"])),
            str(module["rank"]),
            show(module["shared_structure"]),
            show(module["estimated_gain"]),
            "yes" if module["refined"] else "no, own updates kept",
            f"{show(error['max'])} (mean {show(error['mean'])})",
        )
    bad = sum(client["contaminated"] for client in clients)
    for printed in (table, detail):
        for column in printed.columns:
            column.overflow = "fold"  # names are never cut
        console().print(printed)
    typer.echo(f"{len(clients) - bad} benign, {bad} contaminated; written to {output}")


def _print_training(report: dict[str, Any], output: Path) -> None:
    table = Table("client", "status", "examples", "cut off", "steps", "kept at step", "first loss", "last loss")
    for client in report["clients"]:
        trained = client["status"] == "trained"
        status = "[green]trained[/green]" if trained else f"[red]diverged at step {client['diverged_at']}[/red]"
        numbers = (client[key] for key in ("examples", "cut_off", "steps"))
        kept = client["best_step"] or client["steps"]
        losses = (show(client["losses"][place]) for place in (0, -1))
        table.add_row(escape(client["name"]), status, *map(str, numbers), str(kept) if trained else "-", *losses)
    for column in table.columns:
        column.overflow = "fold"  # names are never cut
    console().print(table)
    diverged = [client["name"] for client in report["clients"] if client["status"] == "diverged"]
    typer.echo(f"{len(report['clients']) - len(diverged)} adapters written to {output}")
    if diverged:
        typer.echo(f"clair: no adapter for {', '.join(map(repr, diverged))}: the loss diverged", err=True)
