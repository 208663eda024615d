"""The verdict over adapters on disk: a first set from a few modules, then passes over all modules until the set stays.

A pass takes a set of clients to be benign and does all work for it: it scores the clients in every module, and writes
the refined adapters. The first set is nearly always the one that stays. Then every file is read and written once.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clairlib.alignment.module import Aligned, AlignmentJob, align_module, fit_module
from clairlib.alignment.records import Records
from clairlib.core.processes import workers
from clairlib.recovery.clair import AGREED, first_set, pilots
from clairlib.recovery.leave_one_out import MIN_EXPLAINED_VARIANCE
from clairlib.recovery.module_fit import ModuleFit
from clairlib.recovery.result import ClairResult
from clairlib.recovery.verdict import ModuleScores, iterate_verdict

Progress = Callable[[str, int], None]
Read = Callable[[Tensor], list[ModuleScores]]


def iterate_verdict_on_disk(
    job: AlignmentJob, folder: Path, records: Path, *, jobs: int = 1, progress: Progress | None = None
) -> tuple[ClairResult, dict[str, list[float]]]:
    """Judge until the set stays, write its refined adapters; return the result and the truncation errors by module."""
    names = list(job.adapters.modules)
    with _crew(job, min(jobs, len(names))) as crew:
        fits, benign = search_on_disk(crew, pilots(names, job.clair.solver))
        refine_any = max(float(fit.reading(benign).structure) for fit in fits) >= MIN_EXPLAINED_VARIANCE
        passes = Passes(crew, folder, records, refine_any, progress)
        benign, pooled = iterate_verdict(benign.cpu(), passes.read, _in_memory(job.clair.wider_frame(fits), job.device))
        shared = max(own.summary.shared_structure for own in passes.done.values()) >= MIN_EXPLAINED_VARIANCE
        if shared != refine_any:
            passes.refine_any = shared
            passes.read(benign)
    for client in benign.nonzero()[:, 0].tolist():
        job.writer(folder, client).finish()
    modules = {name: passes.done[name].summary for name in names}
    result = ClairResult(job.adapters.names, benign, pooled.z, pooled.p_values, modules, True)
    return result, {name: passes.done[name].errors for name in names}


def search_on_disk(crew: Crew, names: Sequence[str]) -> tuple[list[ModuleFit], Tensor]:
    """Return the fits of some of the modules, and the set (K,) bool that stays when these modules judge it."""
    found = list(crew.run(fit_module, names[:AGREED], True))
    search = not crew.job.clair.agree([frame for _, frame in found])
    found += crew.run(fit_module, names[AGREED:], search)
    fits, frames = [fit for fit, _ in found], [frame for _, frame in found if frame is not None]
    return fits, crew.job.clair.iterate_verdict(fits, first_set(fits, frames))[0]


def _in_memory(read: Read | None, device: str) -> Read | None:
    """Return ``read`` for sets and scores in main memory; it computes on the device."""
    return None if read is None else (lambda members: [reading.cpu() for reading in read(members.to(device))])


@dataclass
class Passes:
    """Passes over all modules; ``done``: the last one's results; ``refine_any``: some module has a shared subspace."""

    crew: Crew
    folder: Path
    records: Path
    refine_any: bool
    progress: Progress | None
    done: dict[str, Aligned] = field(default_factory=dict)

    def read(self, benign: Tensor) -> list[ModuleScores]:
        """Return the scores in all modules against the frames of a set (K,) bool; write the set's refined adapters."""
        job, records = self.crew.job, Records.of_pass(self.records, benign, self.refine_any)
        names = list(job.adapters.modules)
        if not records.begun():
            for old in self.folder.iterdir():
                shutil.rmtree(old)
            for client in benign.nonzero()[:, 0].tolist():
                job.writer(self.folder, client).create()
            records.begin()
        self.done = {name: known for name in names if (known := records.read(name)) is not None}
        missing = [name for name in names if name not in self.done]
        self._report(self.done)
        results = self.crew.run(align_module, missing, benign, self.refine_any, self.folder)
        for name, result in zip(missing, results, strict=True):
            records.write(name, result)
            self.done[name] = result
            self._report([name])
        return [self.done[name].reading for name in names]

    def _report(self, names: Iterable[str]) -> None:
        if self.progress is not None:
            for name in names:
                self.progress(name, len(self.crew.job.adapters.modules))


@dataclass(frozen=True)
class Crew:
    """Run the work on modules, either in worker processes, or in this process while the next module is being read."""

    job: AlignmentJob
    pool: ProcessPoolExecutor | None

    def run(self, work: Callable[..., Any], names: Sequence[str], *arguments: Any) -> Iterator[Any]:
        """Yield work(job, name, *arguments) for every name, in order."""
        if self.pool is not None:
            tasks = [self.pool.submit(_do, work, name, *arguments) for name in names]
            yield from (task.result() for task in tasks)
            return
        with ThreadPoolExecutor(1) as reader:
            for i, name in enumerate(names):
                for coming in names[i : i + 2]:
                    if coming not in self.job.ahead:
                        self.job.ahead[coming] = reader.submit(self.job.adapters.read, coming)
                yield work(self.job, name, *arguments)


@contextmanager
def _crew(job: AlignmentJob, jobs: int) -> Iterator[Crew]:
    if jobs <= 1:
        yield Crew(job, None)
        return
    with workers(jobs, _enlist, job, max(1, torch.get_num_threads() // jobs)) as pool:
        yield Crew(job, pool)


_job: AlignmentJob | None = None  # the job of this worker process


def _enlist(job: AlignmentJob, threads: int) -> None:
    global _job
    torch.set_num_threads(threads)
    _job = job


def _do(work: Callable[..., Any], name: str, *arguments: Any) -> Any:
    assert _job is not None
    return work(_job, name, *arguments)
