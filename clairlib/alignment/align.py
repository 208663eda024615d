"""From client adapter folders to a verdict, refined adapters and a report: the work of ``clair align``."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clairlib.adapters import AdapterFiles, open_adapters
from clairlib.adapters.collection import blaming
from clairlib.adapters.config import CONFIG
from clairlib.adapters.tensors import WEIGHTS
from clairlib.alignment.module import AlignmentJob
from clairlib.alignment.page import write_alignment_page
from clairlib.alignment.passes import iterate_verdict_on_disk
from clairlib.core import provenance
from clairlib.core.files import PAGE, PICTURE, REPORT, AdapterError, regular_file, resumable_folder
from clairlib.core.limits import MINIMUM_CLIENTS
from clairlib.recovery.clair import CLAIR, UntrustedError
from clairlib.recovery.result import CONTAMINATED, ClairResult, with_set_aside


@dataclass(frozen=True)
class Alignment:
    """Verdict (its modules are summaries), contents of report.json, and the folder that holds the refined updates."""

    result: ClairResult
    report: dict[str, Any]
    output: Path


def align(
    paths: Sequence[str | Path], output: str | Path, *, rank: int | None = None, adapter_rank: int | None = None,
    solver: str = "consensus", side: str = "output", device: str = "cpu", seed: int = 0,
    trusted: Sequence[str] | None = None, keep_contaminated: bool = False, overwrite: bool = False,
    resume: bool = False, jobs: int = 1,
    progress: Callable[[str, int], None] | None = None, draw: Callable[[ClairResult, Path], None] | None = None,
) -> Alignment:  # fmt: skip
    """Judge the clients' adapters, refine the benign ones and write them as adapter folders.

    A client is judged once over all its modules; subspaces are per module. In a module where refinement was refused,
    the client keeps its own update. ``output`` contains a folder for each benign client, report.json, report.html and,
    with ``draw``, report.png.

    Parameters
    ----------
    paths : sequence of path
        PEFT adapter folders, or one parent folder of them. The client names are the folder names.
    output : path
        Folder to write; it appears as a whole or not at all.
    rank, solver, side, seed
        As in :class:`clairlib.CLAIR`.
    adapter_rank : int, optional
        Rank to which the adapters are truncated; each client's own rank in each module if not given.
    device : {"cpu", "cuda"}
    trusted : sequence of str, optional
        As in `CLAIR.fit`: clients known to be honest, whose group is taken for the benign one.
    keep_contaminated : bool
        Copy the two files of contaminated clients unchanged instead of leaving these clients out.
    overwrite, resume : bool
        Replace an output folder that an earlier call wrote; resume a killed or interrupted run of the same clients and
        settings, with an identical result.
    jobs : int
        Number of worker processes; 1 computes in this process. Each process needs the memory of one module.
    progress, draw : callable, optional
        Called with (module, number of modules) when a module is done; with (result, path of report.png) to draw it.

    Raises
    ------
    AdapterError
        One line that names the client, module, option or file that cannot be used; no output is left behind.
    """
    method, output = {"rank": rank, "solver": solver, "side": side, "seed": seed}, Path(output)
    job = open_job(paths, adapter_rank=adapter_rank, device=device, **method)
    if device == "cuda" and jobs > 1:
        raise AdapterError("only one process can use the GPU; leave out --jobs")
    adapters, inputs = job.adapters, [*map(Path, paths), *job.adapters.folders]
    settings: dict[str, Any] = method | {"adapter_rank": adapter_rank, "device": device}
    settings["keep_contaminated"] = keep_contaminated
    settings["trusted"] = sorted(trusted or [])
    how: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "inputs": inputs}
    sent = [not zero for zero in adapters.zero()]
    kept = replace(job, adapters=_with_update(adapters, sent))
    marked = _marked(trusted or [], kept.adapters.names)
    with resumable_folder(output, _identity(adapters, settings), **how) as (folder, records):
        try:
            result, errors = iterate_verdict_on_disk(kept, folder, records, marked, jobs=jobs, progress=progress)
        except BrokenProcessPool as error:
            raise AdapterError("a worker process ended, perhaps for lack of memory; use fewer --jobs") from error
        except UntrustedError as error:
            raise AdapterError(str(error)) from error
        result = result if all(sent) else with_set_aside(result, adapters.names, sent)
        if keep_contaminated:
            _copy_contaminated(folder, adapters, result)
        report = _report(result, errors, settings)
        (folder / REPORT).write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        write_alignment_page(report, folder / PAGE)
        if draw is not None:
            draw(result, folder / PICTURE)
    return Alignment(result, report, output)


def _with_update(adapters: AdapterFiles, sent: list[bool]) -> AdapterFiles:
    if sum(sent) < MINIMUM_CLIENTS:
        zero = adapters.names[sent.index(False)]
        what = f"{len(sent) - sum(sent)} updates are zero, the first that of client {zero!r}"
        raise AdapterError(f"{what}; at least {MINIMUM_CLIENTS} others are needed")
    return adapters if all(sent) else adapters.subset(sent)


def _marked(trusted: Sequence[str], names: list[str]) -> Tensor:
    if unknown := [name for name in trusted if name not in names]:
        raise AdapterError(f"trusted client {unknown[0]!r} is none of the clients with an update")
    return torch.tensor([name in trusted for name in names])


def open_job(paths: Sequence[str | Path], *, adapter_rank: int | None, device: str, **method: Any) -> AlignmentJob:
    """Check the clients' adapters and return the job of aligning them; options as for :func:`align`."""
    try:
        clair = CLAIR(**method)
    except ValueError as error:
        raise AdapterError(str(error)) from error
    if device == "cuda" and not torch.cuda.is_available():
        raise AdapterError("device cuda is not available here; use --device cpu")
    adapters = open_adapters(paths)
    if adapter_rank is not None and adapter_rank < 1:
        raise AdapterError(f"adapter rank must be at least 1, got {adapter_rank}")
    for module, updates in adapters.modules.items():
        p, q = updates[0].shape
        if adapter_rank is not None and adapter_rank > min(p, q):
            what = f"adapter rank {adapter_rank} is larger than module {module!r} allows"
            raise AdapterError(f"{what}: its update is {p} x {q}, so at most {min(p, q)}")
    return AlignmentJob(adapters, clair, device, adapter_rank)


def _identity(adapters: AdapterFiles, settings: dict[str, Any]) -> str:
    """Return a hash of files, settings and versions; a run can be resumed only if it has the same hash."""
    files = [(name, *file.stamp) for name, file in zip(adapters.names, adapters.files, strict=True)]
    facts = [files, settings, provenance.versions()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _copy_contaminated(folder: Path, adapters: AdapterFiles, result: ClairResult) -> None:
    for k in (~result.benign).nonzero()[:, 0].tolist():
        name = adapters.names[k]
        (folder / name).mkdir(exist_ok=True)
        with blaming(name):
            for file in (CONFIG, WEIGHTS):  # checked again, because the folder may have changed since it was read
                shutil.copyfile(regular_file(adapters.folders[k], file), folder / name / file)


def _report(result: ClairResult, errors: dict[str, list[float]], settings: dict[str, Any]) -> dict[str, Any]:
    verdicts = result.verdicts
    clients = [
        {
            "name": name, "contaminated": verdicts[k] == CONTAMINATED, "verdict": verdicts[k],
            "smallest_deviation": _number(result.smallest_deviation[k]), "found_in": result.found_in.get(name, []),
            "score": _number(result.scores[k]), "p_value": _number(result.p_values[k]),
            "modules": {module: _number(own.scores[k]) for module, own in result.modules.items()},
        }
        for k, name in enumerate(result.names)
    ]  # fmt: skip
    modules = [
        {
            "name": name, "shape": list(module.shape), "rank": int(module.rank),
            "shared_structure": _number(module.shared_structure), "estimated_gain": _number(module.gain),
            "refined": bool(module.is_refined),
            "truncation_error": {"max": max(lost, default=None), "mean": sum(lost) / len(lost) if lost else None},
            "spectrum": [_number(value) for value in module.spectrum],
        }
        for (name, module), lost in zip(result.modules.items(), errors.values(), strict=True)
    ]  # fmt: skip
    told = {"clients": clients, "modules": modules, "remarks": result.remarks(), "shared": result.is_shared}
    return told | {"settings": settings, "provenance": provenance.collect()}


def _number(value: Any) -> float | None:
    """Return a JSON number; a value that is not finite becomes null, because strict JSON has no NaN."""
    return number if math.isfinite(number := float(value)) else None
