"""Shared parts of the commands: errors in one line, progress on the error stream, tables, cleaning up after SIGTERM."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table


def stop(error: Exception) -> Any:
    """Print the error in one line and end with exit code 2; characters that cannot be printed become spaces."""
    line = "".join(c if c.isprintable() else " " for c in str(error))
    typer.echo(f"clair: {' '.join(line.split())}", err=True)
    raise typer.Exit(2)


@contextmanager
def terminable() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that half-written output is removed; a second SIGTERM is ignored."""

    def end(number: int, _: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def quiet_libraries() -> None:
    """Switch off the bars and warnings of transformers, datasets and the hub; the commands say what matters."""
    import datasets
    import transformers
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity(hub_logging.CRITICAL)
    transformers.utils.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    warnings.simplefilter("ignore", FutureWarning)


@contextmanager
def progress(doing: str, *, quiet: bool = False) -> Iterator[Callable[..., None]]:
    """Show a bar on the error stream if that is a terminal; yield the bar's rich ``update``."""
    if quiet or not sys.stderr.isatty():  # a hidden bar of rich 14 still prints an empty line
        yield lambda **changes: None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    through = sys.stdout.isatty()  # printed lines go above the bar; those to a pipe stay there
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=through) as bar:
        task = bar.add_task(doing, total=None)
        yield lambda **changes: bar.update(task, **changes)


def print_table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Print a table that wraps long values and cuts none; underscores in column names become spaces."""
    table = Table(*(Column(name.replace("_", " "), overflow="fold") for name in columns))
    for row in rows:
        table.add_row(*map(show, row))
    console = Console() if sys.stdout.isatty() else Console(width=160)  # rich would fold files and pipes at 80
    console.print(table)


def show(value: Any) -> str:
    """Return a value as text: a float with three significant digits, "-" for None."""
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
