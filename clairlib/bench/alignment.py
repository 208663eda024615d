"""An alignment of adapters on disk, the floor under it, and the dense route: measured side by side in one run."""

from __future__ import annotations

import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from io import FileIO
from pathlib import Path
from threading import Barrier
from typing import Any

import pandas as pd
import torch

from clairlib.adapters import AdapterFiles, open_adapters
from clairlib.alignment.align import align
from clairlib.core.processes import workers
from clairlib.linalg.grams import gram
from clairlib.linalg.low_rank import LowRank
from clairlib.simulate import Plan, synthesise
from clairlib.simulate.adapters import CLIENTS

Shape = tuple[int, int, int, int]  # as of clairlib.bench.lower_bound
BUFFER = 2**25  # bytes a call reads
EXPLANATION = (
    "seconds of wall time; floor = read + copy + Gram: the files' bytes at the rate at which these files are read, and "
    "(p + q) N^2 operations, one triangle of both Gram matrices, at the speed of these products in float32, both "
    "measured here; bfloat16: the same at the speed of products of bfloat16 values, where the files hold them; "
    "dense: forming every update, their scatter and its eigenvectors, part of one module timed and scaled up"
)


def measure_planted(
    plan: Plan, *, scratch: Path | None = None, jobs: Sequence[int] = (1,), **sizes: Any
) -> pd.DataFrame:
    """`measure` of planted adapters, written for it and removed; ``sizes`` as of `synthesise`.

    One more column, ``exact``: are those found contaminated the planted ones? They and what is made of them take twice
    their size in ``scratch``.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        truth = synthesise(Path(folder) / "planted", plan, **sizes)
        table = measure(Path(folder) / "planted" / CLIENTS, scratch=Path(folder), jobs=jobs)
    return table.assign(exact=table.contaminated == ", ".join(truth["contaminated"]))


def measure(clients: Path, *, scratch: Path | None = None, jobs: Sequence[int] = (1,)) -> pd.DataFrame:
    """Align the adapters in a folder, on the CPU with each number of processes, and on CUDA where there is one.

    Every process computes on one thread. The files are read once before anything is timed.

    Returns
    -------
    DataFrame
        A row per device and number of ``jobs``: ``floor_seconds`` and its parts ``read_``, ``copy_`` (to the device)
        and ``gram_seconds``; ``align_seconds`` from the first byte to the report, ``search_seconds`` of them until the
        first module is done, ``to_floor`` their ratio; ``bfloat16_floor_seconds`` where all files hold bfloat16 values,
        which are then multiplied as such without loss, and ``to_bfloat16_floor``; ``memory_gb``, at most, of all
        processes; ``dense_seconds``, which were scaled up by ``dense_factor`` and divided by ``jobs``, and
        ``dense_to_align``; ``contaminated``, the names that were found.

    Raises
    ------
    AdapterError
        As :func:`clairlib.alignment.align.align`.
    """
    adapters = open_adapters([clients])
    _read_files([file.path for file in adapters.files])
    cases = [("cpu", count) for count in jobs] + [("cuda", 1)] * torch.cuda.is_available()
    dense = {device: dense_route(adapters, device) for device in dict(cases)}
    rows = []
    for device, count in cases:
        parts, bfloat16_gram = floor_seconds(adapters, count, device)
        own, memory = _alignment(clients, scratch, count, device)
        total, factor = dense[device]
        least, seconds = sum(parts.values()), own["align_seconds"]
        row = {"device": device, "jobs": count, **parts, "floor_seconds": least} | own | {"to_floor": seconds / least}
        if bfloat16_gram is not None:
            less = least - parts["gram_seconds"] + bfloat16_gram
            row |= {"bfloat16_floor_seconds": less, "to_bfloat16_floor": seconds / less}
        row |= {"memory_gb": memory / 1e9, "dense_seconds": total / count, "dense_factor": factor}
        rows.append(row | {"dense_to_align": total / count / seconds, "contaminated": row.pop("contaminated")})
    return pd.DataFrame(rows)


def floor_seconds(adapters: AdapterFiles, jobs: int, device: str = "cpu") -> tuple[dict[str, float], float | None]:
    """``read_``, ``copy_`` and ``gram_seconds`` that so many processes, all at once, cannot do without.

    And the Gram seconds of products of bfloat16 values; None unless all factors hold such.
    """
    paths, products = [file.path for file in adapters.files], gram_products(adapters)
    held = {dtype for own in adapters.modules.values() for client in own for dtype in (client.B_dtype, client.A_dtype)}
    barrier = multiprocessing.get_context("spawn").Barrier(jobs)
    with workers(jobs, _meet, barrier) as pool:
        tasks = [pool.submit(_rates, paths[i::jobs], products, device) for i in range(jobs)]
        rates = [task.result() for task in tasks]
    read, gram_rate, bfloat16_rate, copy = (sum(rate) for rate in zip(*rates, strict=True))
    parts = {
        "read_seconds": adapters.bytes / read,
        "copy_seconds": adapters.bytes / copy if device == "cuda" else 0.0,
        "gram_seconds": 1 / gram_rate,
    }
    return parts, 1 / bfloat16_rate if held == {torch.bfloat16} else None


def gram_products(adapters: AdapterFiles) -> list[tuple[Shape, float]]:
    """B' B and A A' of every module as products, and how often each is taken: half, as they are symmetric."""
    often: Counter[Shape] = Counter()
    for own in adapters.modules.values():
        N = sum(client.rank for client in own)
        often.update((1, N, side, N) for side in own[0].shape)
    return [(shape, count / 2) for shape, count in often.items()]


_barrier: Barrier | None = None  # of this worker process: nobody is timed while another is still starting


def _meet(barrier: Barrier) -> None:
    global _barrier
    torch.set_num_threads(1)
    _barrier = barrier


def _rates(paths: Sequence[Path], products: list[tuple[Shape, float]], device: str) -> tuple[float, ...]:
    """Of this process, in a second: bytes read, all the products, those of bfloat16 values, bytes to the device."""
    from clairlib.bench import lower_bound  # with transformers, which would count as memory of an alignment

    assert _barrier is not None
    _barrier.wait()
    began = time.perf_counter()
    size = _read_files(paths)
    read = size / (time.perf_counter() - began)
    grams = []
    for bfloat16 in (False, True):
        _barrier.wait()
        grams.append(1 / lower_bound.seconds(products, device, bfloat16=bfloat16))
    block = torch.ones(BUFFER, dtype=torch.uint8)
    block.to(device)
    began = lower_bound.now(device)
    block.to(device)
    return read, *grams, BUFFER / max(lower_bound.now(device) - began, 1e-9)


def _read_files(paths: Sequence[Path]) -> int:
    buffer, size = bytearray(BUFFER), 0
    for path in paths:
        with FileIO(path) as file:
            while count := file.readinto(buffer):
                size += count
    return size


def dense_route(adapters: AdapterFiles, device: str = "cpu", clients: int = 2) -> tuple[float, float]:
    """Seconds of the dense route through all modules, and the factor by which what was timed was scaled up.

    Timed, in the smallest module: forming ``clients`` of the K updates (p, q) and adding up Theta_k Theta_k', of one
    triangle; and the eigenvectors of the scatter. Forming goes with p q rho, the scatter with p^2 q, as which both are
    counted, the eigenvectors with p^3. Left out, in the dense route's favour: the search, the judgement of clients left
    out, and the singular value decompositions that make adapters of refined updates.
    """
    shapes = {name: own[0].shape for name, own in adapters.modules.items()}
    name = min(shapes, key=lambda module: shapes[module][0] ** 2 * shapes[module][1])
    (p, q), K, updates = shapes[name], len(adapters.names), adapters.read(name)[:clients]
    formed, decomposed = _dense_parts(updates, device)
    total = 0.0
    for rows, columns in shapes.values():
        total += K / len(updates) * formed * rows**2 * columns / (p**2 * q) + decomposed * (rows / p) ** 3
    return total, total / (formed + decomposed)


def _dense_parts(updates: Sequence[LowRank], device: str) -> tuple[float, float]:
    """Seconds in which updates are formed and their scatter added up, and of its eigenvectors; on one thread."""
    from clairlib.bench import lower_bound
    from clairlib.bench.training import one_thread

    p, _ = updates[0].shape
    with one_thread():
        scatter = torch.zeros(p, p, device=device)
        began = lower_bound.now(device)
        for update in updates:
            dense = update.scale * (update.B.to(device).float() @ update.A.to(device).float())
            scatter += gram(dense.T)
        formed = lower_bound.now(device) - began
        torch.linalg.eigh(scatter)
        return formed, lower_bound.now(device) - began - formed


def _alignment(clients: Path, scratch: Path | None, jobs: int, device: str) -> tuple[dict[str, Any], int]:
    folder = Path(tempfile.mkdtemp(dir=scratch))
    try:
        return apart(run_alignment, clients, folder / "out", jobs, device, children=jobs if jobs > 1 else 0)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_alignment(clients: Path, output: Path, jobs: int = 1, device: str = "cpu") -> dict[str, Any]:
    """Seconds of an alignment, and until its first module was done; the names of the contaminated clients."""
    done: list[float] = []
    began = time.perf_counter()
    found = align([clients], output, jobs=jobs, device=device, progress=lambda *_: done.append(time.perf_counter()))
    seconds = time.perf_counter() - began
    names = ", ".join(found.result.contaminated)
    return {"align_seconds": seconds, "search_seconds": done[0] - began, "contaminated": names}


def apart(work: Callable[..., Any], *arguments: Any, children: int = 0) -> tuple[Any, int]:
    """work(*arguments) in a process of its own with one thread; its result, and the peak of memory in bytes.

    The peak is this process's and that of its largest child times ``children``, so at most that of all together.
    """
    with workers(1, torch.set_num_threads, 1) as pool:
        return pool.submit(_watched, work, arguments, children).result()


def _watched(work: Callable[..., Any], arguments: Sequence[Any], children: int) -> tuple[Any, int]:
    result = work(*arguments)
    return result, _own_peak() + children * _in_bytes(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


def _own_peak() -> int:
    """Linux counts to ru_maxrss what the parent held when it started this process; its status file does not."""
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return _in_bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _in_bytes(maxrss: int) -> int:
    return maxrss if sys.platform == "darwin" else 1024 * maxrss
