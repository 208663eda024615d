"""What the commands share: errors in one line, progress on the error stream, an end by SIGTERM that tidies up."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def stop(error: Exception) -> Any:
    """End with exit code 2 and one line; whatever a hostile name smuggled into it is made printable."""
    line = "".join(c if c.isprintable() else " " for c in str(error))
    typer.echo(f"clair: {' '.join(line.split())}", err=True)
    raise typer.Exit(2)


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM as an exception, so that what is half written is cleared away; a second one is not heard."""

    def end(number: int, _: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def quiet_libraries() -> None:
    """Switch off transformers', datasets' and the hub's own bars and warnings: a command says what matters itself."""
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
    """A bar on the error stream, only where somebody watches it; gives rich's ``update`` of it."""
    name = TextColumn("{task.description}", markup=False)
    columns = (name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    hidden = quiet or not sys.stderr.isatty()
    through = sys.stdout.isatty()  # lines printed meanwhile go above the bar, but stay in a pipe
    own = Console(stderr=True)
    with Progress(*columns, console=own, transient=True, disable=hidden, redirect_stdout=through) as bar:
        task = bar.add_task(doing, total=None)
        yield lambda **changes: bar.update(task, **changes)


def console() -> Console:
    """Where tables go."""
    return Console() if sys.stdout.isatty() else Console(width=160)  # rich would fold files and pipes at 80


def show(value: float | None) -> str:
    """Three digits."""
    return "-" if value is None else f"{value:.3g}"
