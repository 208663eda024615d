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
from clairlib.recovery.oddities import near_duplicates
from clairlib.recovery.power import Verdict
from clairlib.recovery.result import ClairResult, result_of
from clairlib.recovery.verdict import ModuleScores, iterate_verdict

Progress = Callable[[str, int], None]
Read = Callable[[Tensor], list[ModuleScores]]


def iterate_verdict_on_disk(
    job: AlignmentJob, folder: Path, records: Path, trusted: Tensor, *, jobs: int = 1, progress: Progress | None = None
) -> tuple[ClairResult, dict[str, list[float]]]:
    """Judge until the set stays, write its refined adapters; return the result and the truncation errors by module.

    The set starts from the group of clients that holds the ``trusted`` (K,) bool, if there are any.
    """
    names, clair = list(job.adapters.modules), job.clair
    with _crew(job, min(jobs, len(names))) as crew:
        fits, known = search_on_disk(crew, pilots(names, clair.solver))
        fits, known, benign = clair.start(fits, known, trusted.to(job.device))
        refine_any = max(float(fit.reading(benign).structure) for fit in fits) >= MIN_EXPLAINED_VARIANCE
        passes = Passes(crew, folder, records, known.cpu(), refine_any, progress)
        benign, pooled = iterate_verdict(benign.cpu(), passes.read, _in_memory(clair.wider_frame(fits), job.device))
        shared = max(own.summary.shared_structure for own in passes.done.values()) >= MIN_EXPLAINED_VARIANCE
        if shared != refine_any:
            passes.refine_any = shared
            passes.read(benign)
        groups = [group.cpu() for group in clair.groups(fits, ~benign.to(job.device))]
        duplicates = near_duplicates(fits, benign.to(job.device))
    for client in benign.nonzero()[:, 0].tolist():
        job.writer(folder, client).finish()
    modules = {name: passes.done[name].summary for name in names}
    verdict = Verdict.of([passes.done[name].reading for name in names], benign, pooled)
    result = result_of(job.adapters.names, verdict, modules, groups, [], duplicates)
    return result, {name: passes.done[name].errors for name in names}


def search_on_disk(crew: Crew, names: Sequence[str]) -> tuple[list[ModuleFit], Tensor]:
    """Return the fits of some of the modules, and the first set (K,) bool that most of them find."""
    found = list(crew.run(fit_module, names[:AGREED], True))
    search = not crew.job.clair.agree([frame for _, frame in found])
    found += crew.run(fit_module, names[AGREED:], search)
    fits, frames = [fit for fit, _ in found], [frame for _, frame in found if frame is not None]
    return fits, first_set(fits, frames)


def _in_memory(read: Read | None, device: str) -> Read | None:
    """Return ``read`` for sets and scores in main memory; it computes on the device."""
    return None if read is None else (lambda members: [reading.cpu() for reading in read(members.to(device))])


@dataclass
class Passes:
    """Passes over all modules; ``done``: the last one's results; ``refine_any``: some module has a shared subspace.

    ``known`` (K,) bool is the set by which clients are divided by their sizes.
    """

    crew: Crew
    folder: Path
    records: Path
    known: Tensor
    refine_any: bool
    progress: Progress | None
    done: dict[str, Aligned] = field(default_factory=dict)

    def read(self, benign: Tensor) -> list[ModuleScores]:
        """Return the scores in all modules against the frames of a set (K,) bool; write the set's refined adapters."""
        job, records = self.crew.job, Records.of_pass(self.records, benign, self.known, self.refine_any)
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
        results = self.crew.run(align_module, missing, benign, self.known, self.refine_any, self.folder)
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
