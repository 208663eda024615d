"""Alignment of one module in any process: its adapters are read, compressed, judged, refined and written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from clairlib.adapters import AdapterFiles
from clairlib.adapters.collection import blaming
from clairlib.adapters.tensors import Factors
from clairlib.adapters.writer import AdapterWriter
from clairlib.core.files import AdapterError
from clairlib.core.seeds import derive
from clairlib.linalg.low_rank import LowRank, truncate
from clairlib.linalg.refined_factors import Adapters, refined_updates
from clairlib.recovery.clair import CLAIR
from clairlib.recovery.frame import Frame
from clairlib.recovery.inputs import Module, transpose
from clairlib.recovery.module_fit import ModuleFit
from clairlib.recovery.result import ModuleSummary
from clairlib.recovery.verdict import ModuleScores

SHOWN = 32  # number of singular values of the spectrum in the report


@dataclass(frozen=True)
class AlignmentJob:
    """The data that the work on every module needs; it is sent to worker processes."""

    adapters: AdapterFiles
    clair: CLAIR
    device: str
    adapter_rank: int | None
    ahead: dict[str, Future[list[LowRank]]] = field(default_factory=dict, repr=False)  # modules that are being read
    _writers: dict[tuple[Path, int], AdapterWriter] = field(default_factory=dict, repr=False)

    @property
    def weights(self) -> Tensor:
        """Equal weights for all clients."""
        return torch.ones(len(self.adapters.names), dtype=torch.float64, device=self.device)

    def writer(self, folder: Path, client: int) -> AdapterWriter:
        """Return the writer of a client's adapter in ``folder``, with its own scales, and ranks unless one is given."""
        if (folder, client) not in self._writers:
            own = self.adapters.files[client]
            announced = {
                name: Factors(f.p, f.q, self.adapter_rank or f.rank, f.B_dtype, f.A_dtype, f.scale or 1.0)
                for name, f in own.modules.items()
            }
            self._writers[folder, client] = AdapterWriter(folder / self.adapters.names[client], own.config, announced)
        return self._writers[folder, client]


@dataclass(frozen=True)
class Aligned:
    """A module's result for a set taken to be benign: scores by its frame, and each adapter's truncation error."""

    summary: ModuleSummary
    reading: ModuleScores
    errors: list[float]


def read_module(job: AlignmentJob, name: str) -> Module:
    """Read the clients' updates of a module, with the side whose subspace is sought as rows."""
    ahead = job.ahead.pop(name, None)
    updates = job.adapters.read(name) if ahead is None else ahead.result()
    updates = [replace(update, B=update.B.to(job.device), A=update.A.to(job.device)) for update in updates]
    transposed = job.clair.side == "input"
    return Module(name, [transpose(update) for update in updates] if transposed else updates, transposed, numpy=False)


@contextmanager
def located(job: AlignmentJob, name: str) -> Iterator[None]:
    """Convert numerical failures to one line that names the module, unless it names a client or module already."""
    try:
        yield
    except AdapterError:
        raise
    except torch.OutOfMemoryError as error:
        raise AdapterError(f"module {name!r}: out of memory on device {job.device}") from error
    except (ValueError, torch.linalg.LinAlgError) as error:
        named = any(repr(known) in str(error) for known in (*job.adapters.names, *job.adapters.modules))
        raise AdapterError(str(error) if named else f"module {name!r}: {error}") from error


def fit_module(job: AlignmentJob, name: str, search: bool) -> tuple[ModuleFit, Frame | None]:
    """Return a module's fit, and after a ``search`` the frame that this module suggests by itself."""
    module = read_module(job, name)
    with located(job, name):
        fit = job.clair.prepare(module, job.weights)
        return fit, job.clair.first_frame(module, fit)[0] if search else None


def align_module(
    job: AlignmentJob, name: str, benign: Tensor, known: Tensor, refine_any: bool, folder: Path
) -> Aligned:
    """Judge all clients by the frame of the ``benign`` (K,) bool, and write the benign clients' adapters of the module.

    Clients are divided by their sizes as the first set ``known`` (K,) bool shows them. ``refine_any`` says whether the
    clients share a subspace in some module. If not, nothing is refined.
    """
    module, benign = read_module(job, name), benign.to(job.device)
    with located(job, name):
        fit = job.clair.prepare(module, job.weights, benign, keep=True).normalised(known.to(job.device))
        reading = fit.reading(benign)
        outcome = fit.outcome(benign)
        is_refined = outcome.is_refined(refine_any)
        clients = benign.nonzero()[:, 0].tolist()
        updates = cast(list[LowRank], module.updates)
        places = [job.writer(folder, k).modules[name] for k in clients]
        if is_refined:
            parts, generator = fit.parts(outcome.frame, updates), derive(job.clair.seed, "off", name)
            ranks = [place.rank for place in places]
            adapters = refined_updates(parts, updates, clients, ranks, generator, fit.scales)
        else:
            adapters = _own([updates[k] for k in clients], places)
    errors = []
    for k in clients:
        with blaming(job.adapters.names[k]), located(job, name):
            update, error = next(adapters)
            _write(job, folder, module, k, update)
            errors.append(error)
    own = outcome.summary(fit, module, refine_any)
    shown = {"spectrum": own["spectrum"][:SHOWN]} | {key: own[key].cpu() for key in ("scores", "p_values", "sizes")}
    summary = ModuleSummary(**own | shown)
    return Aligned(summary, reading.cpu(), errors)


def _own(updates: Sequence[LowRank], places: Sequence[Factors]) -> Adapters:
    """Yield the clients' own updates, truncated to the announced ranks in at least single precision."""
    for own, place in zip(updates, places, strict=True):
        if own.rank == place.rank:
            yield own, 0.0
        else:
            dtype = torch.promote_types(torch.promote_types(own.B.dtype, own.A.dtype), torch.float32)
            yield truncate(replace(own, B=own.B.to(dtype), A=own.A.to(dtype)), place.rank)


def _write(job: AlignmentJob, folder: Path, module: Module, client: int, update: LowRank) -> None:
    """Write a client's adapter of the module, in its file's dtypes and at its own scale."""
    writer = job.writer(folder, client)
    place = writer.modules[module.name]
    update = transpose(update) if module.transposed else update
    if update.scale != place.scale:
        ratio = update.scale / place.scale
        size = abs(ratio) ** 0.5
        update = LowRank(update.B * (ratio / size if size else 0.0), update.A * size, place.scale)
    writer.write(module.name, replace(update, B=update.B.to(place.B_dtype), A=update.A.to(place.A_dtype)))
