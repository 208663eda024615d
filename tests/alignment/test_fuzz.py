"""Spoiled adapter folders end in success or in one line of AdapterError, whatever was done to them.

Continuous integration runs a seeded sample. ``CLAIR_FUZZ=2000 pytest tests/test_fuzz.py`` runs so many mutations; a
failure names their numbers, and ``CLAIR_FUZZ=17-17`` runs number 17 alone. A mutation depends on its number only.

Memory is bounded by the address space: while a mutation runs the process may grow by twice the size of the files plus
SPARE, which the libraries need. All files together stay below 10 MB, so that any allocation of a declared size beyond
them fails, touched or not; and an error about memory counts as one.
"""

import contextlib
import os
import resource
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch

from clairlib import LowRank
from clairlib.adapters.folder import read_lora, write_lora
from clairlib.alignment import align as alignment
from clairlib.core.files import AdapterError
from helpers.adapter_mutations import MUTATIONS

SPARE = 2**28  # bytes
SECONDS = 10.0
CLIENTS = ["c0", "c1", "c2", "c3"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of address space and time as on Linux")


def numbers() -> range:
    first, _, last = os.environ.get("CLAIR_FUZZ", "84").rpartition("-")
    return range(int(first), int(last) + 1) if first else range(int(last))


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of two small modules that share a direction."""
    folder = tmp_path_factory.mktemp("fuzz")
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    shared = {"first": normal(8, 1), "second": normal(6, 1)}
    for client in CLIENTS:
        updates = {
            module: LowRank(torch.cat([u, 0.05 * normal(len(u), 1)], dim=1), normal(2, 7), 2.0)
            for module, u in shared.items()
        }
        write_lora(folder / client, {"base_model_name_or_path": "tiny"}, updates)
    return folder


@pytest.fixture(autouse=True)
def _provenance_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collected once: it starts git and reads every package's metadata, and depends on no adapter."""
    facts = alignment.provenance.collect()
    monkeypatch.setattr(alignment.provenance, "collect", lambda: facts)


class TooSlow(BaseException):
    pass


@contextlib.contextmanager
def limits(room: int, seconds: float) -> Iterator[None]:
    """Bound the growth of the address space and the time of the block."""

    def ring(*_: object) -> None:
        raise TooSlow

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (used + room, hard))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def listing(work: Path) -> dict[str, tuple]:
    """What lies below a folder; no file is opened, it may be a pipe."""
    entries = {}
    for parent, folders, files in os.walk(work):
        for name in folders + files:
            status = os.lstat(path := os.path.join(parent, name))
            size = 0 if name in folders else status.st_size
            entries[os.path.relpath(path, work)] = status.st_mode, size, 0 if name in folders else status.st_mtime_ns
    return entries


def fault(work: Path, seconds: float = SECONDS, **options: object) -> str | None:
    """Align the clients of a folder; what is wrong with how that ended, None if nothing is."""
    before = listing(work)
    room = 2 * sum(size for _, size, _ in before.values()) + SPARE
    (work / "here").mkdir()
    home = Path.cwd()
    os.chdir(work / "here")  # so that a relative name is noticed
    try:
        with limits(room, seconds):
            outcome = alignment.align([work / "clients"], work / "out", **options)
    except AdapterError as error:
        outcome, line = None, str(error)
        if len(line.splitlines()) != 1 or "memory" in line.lower():
            return f"message {line!r}"
    except TooSlow:
        return f"more than {seconds} s"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    finally:
        os.chdir(home)
        left = list((work / "here").iterdir())
        shutil.rmtree(work / "here")
    after = listing(work)
    if left or {place: own for place, own in after.items() if place.split("/")[0] != "out"} != before:
        return "files outside the output folder"
    if outcome is None:
        return "a refused input left an output" if (work / "out").exists() else None
    return fault_of_output(work / "out", outcome.result.names, outcome.result.benign.tolist())


def fault_of_output(out: Path, names: list[str], benign: list[bool]) -> str | None:
    expected = {name for name, good in zip(names, benign, strict=True) if good}
    written = {path.name for path in out.iterdir() if path.is_dir()}
    if not expected <= written <= set(names):
        return f"folders {written}, expected {expected}"
    if any(path.is_symlink() for path in out.rglob("*")):
        return "a link in the output"
    for name in expected:
        try:
            read_lora(out / name)
        except AdapterError as error:
            return f"wrote an adapter it cannot read: {error}"
    return None


def spoiled(number: int, clean: Path, work: Path) -> dict[str, object]:
    """Spoil a copy of the clients, one of them or all alike; options for :func:`align`."""
    rng = Random(f"mutation {number}")
    shutil.copytree(clean, work / "clients")
    mutate = MUTATIONS[list(MUTATIONS)[number % len(MUTATIONS)]]
    seed = rng.random()
    for client in CLIENTS if rng.random() < 0.3 else [rng.choice(CLIENTS)]:
        if (work / "clients" / client).is_dir():
            with contextlib.suppress(OSError):  # all clients got one name
                mutate(Random(seed), work / "clients" / client)
    return {"keep_contaminated": rng.random() < 0.5, "adapter_rank": rng.choice([None, None, 1])}


def test_spoiled_folders_end_in_success_or_in_one_line(clean: Path, tmp_path: Path) -> None:
    alignment.align([clean], tmp_path / "warm")  # libraries take their memory
    faults = {}
    for number in numbers():
        work = tmp_path / str(number)
        options = spoiled(number, clean, work)
        if (what := fault(work, **options)) is not None:
            faults[number, list(MUTATIONS)[number % len(MUTATIONS)]] = what
        shutil.rmtree(work)
    assert not faults


def hang(*_: object, **__: object) -> None:
    while True:
        pass


def allocate(*_: object, **__: object) -> None:
    torch.empty(2**31, dtype=torch.uint8)


def stray(paths: list[Path], *_: object, **__: object) -> None:
    (paths[0] / "evil").touch()
    raise AdapterError("one line")


def relative(*_: object, **__: object) -> None:
    Path("evil").touch()
    raise AdapterError("one line")


def partial(paths: list[Path], out: Path, **_: object) -> None:
    out.mkdir()
    raise AdapterError("one line")


def lines(*_: object, **__: object) -> None:
    raise AdapterError("two\nlines")


@pytest.mark.parametrize("conduct", [hang, allocate, stray, relative, partial, lines, None])
def test_faults_are_noticed(clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, conduct: object) -> None:
    shutil.copytree(clean, tmp_path / "clients")
    if conduct is not None:
        monkeypatch.setattr(alignment, "align", conduct)
    assert (fault(tmp_path, seconds=0.5 if conduct else SECONDS) is None) == (conduct is None)
