"""From client adapter folders to a verdict, refined adapters and a report: what ``clair align`` does."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from clairlib import provenance
from clairlib.adapters import AdapterSet, blaming, client_folders, load_adapters
from clairlib.clair import CLAIR
from clairlib.factors import LowRank, truncate
from clairlib.folders import PICTURE, REPORT, AdapterError, regular_file, whole_folder
from clairlib.lora import WEIGHTS, write_lora
from clairlib.lora_config import CONFIG
from clairlib.result import ClairResult, ModuleResult


@dataclass(frozen=True)
class Alignment:
    """Outcome of :func:`align`: the fit, the report as written to report.json, and the output folder."""

    result: ClairResult
    report: dict[str, Any]
    output: Path


def align(
    paths: Sequence[str | Path],
    output: str | Path,
    *,
    rank: int | None = None,
    adapter_rank: int | None = None,
    solver: str = "consensus",
    side: str = "output",
    device: str = "cpu",
    seed: int = 0,
    keep_contaminated: bool = False,
    overwrite: bool = False,
    progress: Callable[[str, int], None] | None = None,
    draw: Callable[[ClairResult, Path], None] | None = None,
) -> Alignment:
    """Judge the clients' adapters, refine the benign ones and write them as adapter folders.

    A client is judged once over all its modules; subspaces are per module. A benign client's refined update
    is truncated to ``adapter_rank`` (default: its own rank in that module); in a module where refinement was
    refused it keeps its own update. ``output`` holds a folder for each benign client, report.json and, with
    ``draw``, report.png.

    Parameters
    ----------
    paths : sequence of path
        PEFT adapter folders, or one parent folder of them. Client name = folder name.
    output : path
        Folder to write; it appears whole or not at all.
    rank : int, optional
        Shared rank r; estimated per module when not given.
    adapter_rank : int, optional
        Rank of the adapters written.
    solver, side, seed
        As in :class:`clairlib.CLAIR`.
    device : str
        Where to compute, ``cpu`` or ``cuda``.
    keep_contaminated : bool
        Copy the two files of contaminated clients unchanged instead of leaving them out.
    overwrite : bool
        Replace an output folder that an earlier call wrote.
    progress : callable, optional
        Called with (module, number of modules) when a module is done.
    draw : callable, optional
        Called with (result, path of report.png), e.g. to save ``clairlib.plots.overview(result)``.

    Raises
    ------
    AdapterError
        One line naming the client, module, option or file that cannot be used; nothing is left behind.
    """
    method = {"rank": rank, "solver": solver, "side": side, "seed": seed}
    clair = _solver(method)
    output, inputs = Path(output), [*map(Path, paths), *client_folders(paths).values()]
    with whole_folder(output, overwrite=overwrite, inputs=inputs) as folder:
        adapters = load_adapters(paths)
        _check_adapter_rank(adapters, adapter_rank)
        result = _fit(adapters, clair, device, progress)
        errors = _write_benign(folder, adapters, result, adapter_rank)
        if keep_contaminated:
            _copy_contaminated(folder, adapters, result)
        options = {"adapter_rank": adapter_rank, "device": device, "keep_contaminated": keep_contaminated}
        report = _report(result, errors, method | options)
        text = json.dumps(report, indent=2, allow_nan=False)
        (folder / REPORT).write_text(text + "\n", encoding="utf-8")
        if draw is not None:
            draw(result, folder / PICTURE)
    return Alignment(result, report, output)


def _check_adapter_rank(adapters: AdapterSet, rank: int | None) -> None:
    if rank is None:
        return
    if rank < 1:
        raise AdapterError(f"adapter rank must be at least 1, got {rank}")
    for module, updates in adapters.modules.items():
        p, q = updates[0].shape
        if rank > min(p, q):
            what = f"adapter rank {rank} is larger than module {module!r} allows"
            raise AdapterError(f"{what}: its update is {p} x {q}, so at most {min(p, q)}")


def _solver(method: dict[str, Any]) -> CLAIR:
    try:
        return CLAIR(**method)
    except ValueError as error:
        raise AdapterError(str(error)) from error


def _fit(adapters: AdapterSet, solver: CLAIR, device: str, progress: Callable[[str, int], None] | None) -> ClairResult:
    if device == "cuda" and not torch.cuda.is_available():
        raise AdapterError("device cuda is not available here; use --device cpu")
    waiting = list(adapters.modules)

    def done(module: str) -> None:
        waiting.remove(module)
        if progress is not None:
            progress(module, len(adapters.modules))

    try:
        modules = {module: _working_copy(updates, device) for module, updates in adapters.modules.items()}
        return solver.fit(modules, names=adapters.names, progress=done)
    except (ValueError, torch.linalg.LinAlgError) as error:
        raise AdapterError(_located(str(error), adapters, waiting)) from error
    except torch.OutOfMemoryError as error:
        raise AdapterError(_located(f"out of memory on device {device}", adapters, waiting)) from error


def _located(message: str, adapters: AdapterSet, waiting: list[str]) -> str:
    """The message, after the module at work where it names neither a client nor a module itself."""
    if not waiting or any(repr(name) in message for name in (*adapters.names, *adapters.modules)):
        return message
    return f"module {waiting[0]!r}: {message}"


def _working_copy(updates: list[LowRank], device: str) -> list[LowRank]:
    """One dtype for a module, at least single, so that refined factors are rounded once, when written."""
    double = any(torch.float64 in (update.B.dtype, update.A.dtype) for update in updates)
    dtype = torch.float64 if double else torch.float32
    return [replace(update, B=update.B.to(device, dtype), A=update.A.to(device, dtype)) for update in updates]


def _write_benign(
    folder: Path, adapters: AdapterSet, result: ClairResult, adapter_rank: int | None
) -> dict[str, list[float]]:
    """Write the benign clients' folders; relative truncation errors by module."""
    errors: dict[str, list[float]] = {module: [] for module in adapters.modules}
    for k, name in enumerate(adapters.names):
        if not result.benign[k]:
            continue
        updates = {}
        for module, originals in adapters.modules.items():
            updates[module], error = _refined(result.modules[module], originals[k], k, adapter_rank)
            errors[module].append(error)
        with blaming(name):
            write_lora(folder / name, adapters.configs[k], updates)
    return errors


def _refined(module: ModuleResult, original: LowRank, k: int, adapter_rank: int | None) -> tuple[LowRank, float]:
    """Client k's update of one module at the rank asked for, in its file's dtype; the truncation error."""
    rank = adapter_rank or original.rank
    if not module.is_refined and rank == original.rank:
        return original, 0.0
    update, error = truncate(module.refined[k] if module.is_refined else original, rank)
    return replace(update, B=update.B.to(original.B.dtype), A=update.A.to(original.A.dtype)), error


def _copy_contaminated(folder: Path, adapters: AdapterSet, result: ClairResult) -> None:
    for k, name in enumerate(adapters.names):
        if result.benign[k]:
            continue
        (folder / name).mkdir()
        with blaming(name):
            for file in (CONFIG, WEIGHTS):  # checked again: the folder may have changed since it was read
                shutil.copyfile(regular_file(adapters.folders[k], file), folder / name / file)


def _report(result: ClairResult, errors: dict[str, list[float]], settings: dict[str, Any]) -> dict[str, Any]:
    clients = [
        {
            "name": name,
            "contaminated": not bool(result.benign[k]),
            "score": _number(result.scores[k]),
            "p_value": _number(result.p_values[k]),
            "modules": {module: _number(own.scores[k]) for module, own in result.modules.items()},
        }
        for k, name in enumerate(result.names)
    ]
    modules = [
        {
            "name": name,
            "shape": list(module.shape),
            "rank": int(module.rank),
            "shared_structure": _number(module.shared_structure),
            "estimated_gain": _number(module.gain),
            "refined": bool(module.is_refined),
            "truncation_error": _spread(errors[name]),
        }
        for name, module in result.modules.items()
    ]
    return {"clients": clients, "modules": modules, "settings": settings, "provenance": provenance.collect()}


def _spread(errors: list[float]) -> dict[str, float | None]:
    """Largest and mean relative Frobenius error over the benign clients."""
    return {"max": max(errors, default=None), "mean": sum(errors) / len(errors) if errors else None}


def _number(value: Any) -> float | None:
    """A JSON number; what is not finite becomes null, since strict JSON has no NaN."""
    number = float(value)
    return number if math.isfinite(number) else None
