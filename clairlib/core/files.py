"""Safe access to files in an adapter folder, and output folders that appear completely or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

REPORT, PAGE, PICTURE = "report.json", "report.html", "report.png"


class AdapterError(ValueError):
    """An adapter or output folder cannot be used. The message is one line that names client, module or file."""


def regular_file(folder: Path, name: str) -> Path:
    """Return the path of a file; raise AdapterError if it is missing, not regular, or a link that leads outside."""
    path = folder / name
    if not os.path.lexists(path):
        raise AdapterError(f"{name} is missing in {str(folder)!r}")
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise AdapterError(f"{name} is a link that leads outside {str(folder)!r}; copy the file there")
    if not path.is_file():
        raise AdapterError(f"{name} in {str(folder)!r} is not a regular file")
    return path


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yield a path to write to; the file there replaces ``path`` when the block ends, or is removed if it raises."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(output: Path, *, overwrite: bool = False, inputs: Iterable[Path] = ()) -> Iterator[Path]:
    """Yield a new folder to write into; it becomes ``output`` when the block ends, and is removed if the block raises.

    It lies beside ``output`` until then, so that the last step is one rename. An old output is moved aside first, moved
    back if the rename fails, and removed only afterwards.

    Raises
    ------
    AdapterError
        ``output`` exists (without ``overwrite``), contains something that no earlier run wrote, overlaps one of
        ``inputs``, or cannot be written.
    """
    output = Path(os.path.abspath(output))
    _check_output(output, overwrite, inputs)
    try:
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    except OSError as error:
        raise AdapterError(f"cannot write output {str(output)!r}: {error.strerror}") from error
    try:
        fresh = staging / "new"
        fresh.mkdir()
        yield fresh
        _swap(fresh, output, staging / "old")
    except OSError as error:
        raise AdapterError(f"cannot write output {str(output)!r}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def resumable_folder(
    output: Path, identity: str, *, resume: bool = False, overwrite: bool = False, inputs: Iterable[Path] = ()
) -> Iterator[tuple[Path, Path]]:
    """Yield an output folder like `whole_folder`, but in a form in which a killed or interrupted run can be resumed.

    Two folders are yielded: the one that becomes ``output``, and one for records of finished work. With ``resume`` they
    are as an earlier run of the same ``identity`` left them, otherwise empty. An unfinished run leaves its folders
    behind if its process is killed; with ``resume`` also if it is interrupted.

    Raises
    ------
    AdapterError
        As for `whole_folder`; or an unfinished run is still running, has another identity, or ``resume`` is False.
    """
    output = Path(os.path.abspath(output))
    _check_output(output, overwrite, inputs)
    staging = output.parent / f".{output.name}.partial"
    fresh, records, run = staging / "new", staging / "records", staging / "run"
    try:
        _enter(staging, identity, resume)
        with run.open("r+") as held:
            _hold(held.fileno(), staging)
            for folder in (fresh, records):
                folder.mkdir(exist_ok=True)
            yield fresh, records
            _swap(fresh, output, staging / "old")
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise AdapterError(f"cannot write output {str(output)!r}: {error.strerror or error}") from error
    except _Occupied as error:
        raise AdapterError(str(error)) from error
    except BaseException as error:
        if isinstance(error, Exception) or not resume:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    shutil.rmtree(staging, ignore_errors=True)


class _Occupied(Exception):
    """The staging folder belongs to another run and must not be removed."""


def _enter(staging: Path, identity: str, resume: bool) -> None:
    """Create the staging folder, or check that the existing one has this identity."""
    run = staging / "run"
    if not os.path.lexists(staging):
        staging.mkdir()
        run.write_text(identity, encoding="utf-8")
        return
    if not resume:
        raise _Occupied(f"an unfinished run left {str(staging)!r}; pass --resume to go on from it, or remove it")
    try:
        known = run.read_text(encoding="utf-8") if not staging.is_symlink() else ""
    except (OSError, ValueError):
        known = ""
    if known != identity:
        raise _Occupied(f"{str(staging)!r} belongs to a run with other clients, settings or versions; remove it")


def _hold(descriptor: int, staging: Path) -> None:
    """Lock the staging folder against a second run, if the operating system supports it."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise _Occupied(f"another run is writing into {str(staging)!r}") from error


def _check_output(output: Path, overwrite: bool, inputs: Iterable[Path]) -> None:
    real = output.resolve()
    for folder in (Path(path).resolve() for path in inputs):
        if real == folder or real.is_relative_to(folder):
            raise AdapterError(f"output {str(output)!r} lies in the input folder {str(folder)!r}")
        if folder.is_relative_to(real):
            raise AdapterError(f"output {str(output)!r} holds the input folder {str(folder)!r}")
    if not os.path.lexists(output):
        return
    if not overwrite:
        raise AdapterError(f"output {str(output)!r} exists; choose another place or pass --overwrite")
    if output.is_symlink() or not output.is_dir():
        raise AdapterError(f"output {str(output)!r} is not a folder; remove it first")
    for child in sorted({path.name for path in output.iterdir()} - _written_names(output)):
        raise AdapterError(f"output {str(output)!r} holds {child!r}, not written by clair; move it away first")


def _written_names(output: Path) -> set[str]:
    """Return the names of what an earlier run wrote into the folder, according to its report."""
    try:
        report = json.loads((output / REPORT).read_text(encoding="utf-8"))
        clients = {str(client["name"]) for client in report["clients"]}
        complete = "modules" in report and "settings" in report
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()
    return {REPORT, PAGE, PICTURE, *clients} if complete else set()


def _swap(fresh: Path, output: Path, aside: Path) -> None:
    try:
        if os.path.lexists(output):
            os.rename(output, aside)
        os.rename(fresh, output)
    except BaseException:  # an interruption between the two renames must not lose the old folder
        if aside.exists() and not output.exists():
            os.rename(aside, output)
        raise
