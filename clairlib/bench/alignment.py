"""Benchmark of an alignment of adapters on disk, against a lower bound and against the dense route, in one run."""

from __future__ import annotations

import multiprocessing
import resource
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

Shape = tuple[int, int, int, int]  # as in clairlib.bench.lower_bound
BUFFER = 2**25  # bytes per read call
EXPLANATION = (
    "seconds of wall time; floor = read + copy + Gram, a lower bound: reading the files at the measured rate, and the "
    "(p + q) N^2 operations of one triangle of both Gram matrices at the measured speed of these products in float32; "
    "bfloat16: the same bound with products of bfloat16 values, where the files hold such values; "
    "dense: forming every update, their scatter and its eigenvectors, timed for a part of one module and scaled up"
)


def measure_planted(
    plan: Plan, *, scratch: Path | None = None, jobs: Sequence[int] = (1,), **sizes: Any
) -> pd.DataFrame:
    """Write planted adapters, run `measure` on them, and remove them; ``sizes`` are arguments of `synthesise`.

    The table has one more column, ``exact``: whether the clients found contaminated are the planted ones. The adapters
    and the output made from them take twice the adapters' size in ``scratch``.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        truth = synthesise(Path(folder) / "planted", plan, **sizes)
        table = measure(Path(folder) / "planted" / CLIENTS, scratch=Path(folder), jobs=jobs)
    return table.assign(exact=table.contaminated == ", ".join(truth["contaminated"]))


def measure(clients: Path, *, scratch: Path | None = None, jobs: Sequence[int] = (1,)) -> pd.DataFrame:
    """Time the alignment of a folder of adapters, on the CPU with each number of processes and on CUDA if available.

    Every process computes on one thread. The files are read once before anything is timed.

    Returns
    -------
    DataFrame
        One row per device and number of ``jobs``. ``floor_seconds`` is the lower bound, the sum of ``read_seconds``,
        ``copy_seconds`` (to the device) and ``gram_seconds``. ``align_seconds`` runs from the first byte to the report,
        ``search_seconds`` until the first module is done; ``to_floor`` is align_seconds / floor_seconds. If all files
        hold bfloat16 values, ``bfloat16_floor_seconds`` and ``to_bfloat16_floor`` are bound and ratio for products of
        such values, which lose nothing. ``memory_gb`` is an upper bound over all processes. ``dense_seconds`` is the
        time of the dense route, scaled up by ``dense_factor`` and divided by ``jobs``; ``dense_to_align`` is its ratio
        to align_seconds. ``contaminated`` names the clients found contaminated.

    Raises
    ------
    AdapterError
        As in :func:`clairlib.alignment.align.align`.
    """
    adapters = open_adapters([clients])
    read_files([file.path for file in adapters.files])
    cases = [("cpu", count) for count in jobs] + [("cuda", 1)] * torch.cuda.is_available()
    dense = {device: dense_route(adapters, device) for device in dict(cases)}
    rows = []
    for device, count in cases:
        parts, bfloat16_gram = floor_seconds(adapters, count, device)
        with tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as folder:
            arguments = (clients, Path(folder) / "out", count, device)
            own, memory = apart(run_alignment, *arguments, children=count if count > 1 else 0)
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
    """Measure the lower bound for ``jobs`` simultaneous processes: ``read_``, ``copy_`` and ``gram_seconds``.

    The second result is the Gram seconds with products of bfloat16 values; None unless all factors hold such values.
    """
    paths, products = [file.path for file in adapters.files], gram_products(adapters)
    held = {dtype for own in adapters.modules.values() for client in own for dtype in (client.B_dtype, client.A_dtype)}
    barrier = multiprocessing.get_context("spawn").Barrier(jobs)
    with workers(jobs, _meet, barrier) as pool:
        tasks = [pool.submit(_rates, paths[i::jobs], products, device) for i in range(jobs)]
        rates = [task.result() for task in tasks]
    read, gram_rate, bfloat16_rate, copy = (sum(rate) for rate in zip(*rates, strict=True))
    copied = adapters.bytes / copy if device == "cuda" else 0.0
    parts = {"read_seconds": adapters.bytes / read, "copy_seconds": copied, "gram_seconds": 1 / gram_rate}
    return parts, 1 / bfloat16_rate if held == {torch.bfloat16} else None


def gram_products(adapters: AdapterFiles) -> list[tuple[Shape, float]]:
    """List the products B' B and A A' of every module, and how often; each counts half, as its result is symmetric."""
    often: Counter[Shape] = Counter()
    for own in adapters.modules.values():
        N = sum(client.rank for client in own)
        often.update((1, N, side, N) for side in own[0].shape)
    return [(shape, count / 2) for shape, count in often.items()]


_barrier: Barrier | None = None  # one per worker process: timing begins once all workers have started


def _meet(barrier: Barrier) -> None:
    global _barrier
    torch.set_num_threads(1)
    _barrier = barrier


def _rates(paths: Sequence[Path], products: list[tuple[Shape, float]], device: str) -> tuple[float, ...]:
    """Measure what this process does per second: bytes read, all products, those in bfloat16, bytes to the device."""
    from clairlib.bench import lower_bound  # loads transformers, which would count as memory of an alignment

    assert _barrier is not None
    _barrier.wait()
    began = time.perf_counter()
    size = read_files(paths)
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


def read_files(paths: Sequence[Path]) -> int:
    """Read the files in blocks and keep none; return their bytes."""
    buffer, size = bytearray(BUFFER), 0
    for path in paths:
        with FileIO(path) as file:
            while count := file.readinto(buffer):
                size += count
    return size


def dense_route(adapters: AdapterFiles, device: str = "cpu") -> tuple[float, float]:
    """Return the estimated seconds of the dense route through all modules, and the factor of scaling up.

    A part is timed in the smallest module: forming two of the K updates (p, q), summing one triangle of
    Theta_k Theta_k', and computing the eigenvectors of the scatter. Forming costs p q rho and the scatter p^2 q; both
    are scaled up as p^2 q, the eigenvectors as p^3. The estimate favours the dense route: it leaves out the search, the
    leave-one-out scores, and the singular value decompositions that turn refined updates into adapters.
    """
    shapes = {name: own[0].shape for name, own in adapters.modules.items()}
    name = min(shapes, key=lambda module: shapes[module][0] ** 2 * shapes[module][1])
    (p, q), K, updates = shapes[name], len(adapters.names), adapters.read(name)[:2]
    formed, decomposed = dense_parts(updates, device)
    total = 0.0
    for rows, columns in shapes.values():
        total += K / len(updates) * formed * rows**2 * columns / (p**2 * q) + decomposed * (rows / p) ** 3
    return total, total / (formed + decomposed)


def dense_parts(updates: Sequence[LowRank], device: str) -> tuple[float, float]:
    """Return the seconds of forming updates and their scatter, and of the scatter's eigenvectors, on one thread."""
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


def run_alignment(clients: Path, output: Path, jobs: int = 1, device: str = "cpu") -> dict[str, Any]:
    """Run an alignment; return its seconds, those of its search, and the names of the contaminated clients."""
    done: list[float] = []
    began = time.perf_counter()
    found = align([clients], output, jobs=jobs, device=device, progress=lambda *_: done.append(time.perf_counter()))
    seconds = time.perf_counter() - began
    names = ", ".join(found.result.contaminated)
    return {"align_seconds": seconds, "search_seconds": done[0] - began, "contaminated": names}


def apart(work: Callable[..., Any], *arguments: Any, children: int = 0) -> tuple[Any, int]:
    """Call work(*arguments) in a separate process with one thread; return its result and the peak of memory in bytes.

    The peak is an upper bound: that of the process plus ``children`` times that of its largest child.
    """
    with workers(1, torch.set_num_threads, 1) as pool:
        return pool.submit(watched, work, arguments, children).result()


def watched(work: Callable[..., Any], arguments: Sequence[Any], children: int) -> tuple[Any, int]:
    """Return work(*arguments) and the peak of memory in bytes, as in `apart`, with this process as the separate one."""
    result = work(*arguments)
    own = in_bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    if sys.platform == "linux":  # there it includes the memory that the parent held when it started this process
        lines = Path("/proc/self/status").read_text().splitlines()
        own = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return result, own + children * in_bytes(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


def in_bytes(maxrss: int) -> int:
    """Return a peak memory as getrusage gives it, KiB but on macOS, in bytes."""
    return maxrss if sys.platform == "darwin" else 1024 * maxrss
