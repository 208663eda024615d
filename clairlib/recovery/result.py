"""Results of CLAIR: a verdict for every client, and the subspace and the refined updates of every module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from clairlib.recovery.convex import Certificate
from clairlib.recovery.inputs import SINGLE
from clairlib.recovery.leave_one_out import MIN_EXPLAINED_VARIANCE
from clairlib.recovery.refinement import Gain


@dataclass(frozen=True)
class ModuleSummary:
    """Results of one weight matrix, without the updates themselves.

    ``shape`` is (p, q) and ``rank`` is r. ``scores`` (K,) are as in ClairResult, but of this module alone. ``gain`` is
    the estimated fraction of the local squared error that refinement removes, ``gain_terms`` its parts. ``is_refined``
    is False if clients keep their own updates: the gain is not positive, or no module has a shared subspace.
    ``shared_structure``, in [0, 1], is the explained variance of the benign clients by leave-one-out prediction, beyond
    chance. ``spectrum`` holds the singular values of the benign clients' centred stack; the rank shows as a drop in it.
    ``certificate`` is that of the convex program, if solved.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    scores: Any
    gain: float
    gain_terms: Gain
    is_refined: bool
    shared_structure: float
    spectrum: np.ndarray
    certificate: Certificate | None


@dataclass(frozen=True)
class ModuleResult(ModuleSummary):
    """Results of one weight matrix, with its subspace and the refined updates.

    ``basis`` U (p, r), or (q, r) for side "input", is unique up to rotation; compare with ``subspace.sin_theta``.
    ``common_part`` is P_perp M (p, q). ``refined`` has the form of the input, with a contaminated client's own update.
    As LowRank it has the rank asked for, balanced factors and scale 1. ``truncation_errors`` (K,) are the relative
    Frobenius errors of that, 0 for dense and for own updates. Before truncation it is U U' Theta_k + ``common_part``
    (side "input": Theta_k U U' + ``common_part``); `linalg.refined_factors.exact_update` joins these factors.
    """

    basis: Any
    common_part: Any
    refined: Any
    truncation_errors: Any


def _of_modules(name: str, meaning: str) -> property:
    """Make a property that reads a field of the module, or a dict of it if the updates were given by module."""

    def read(result: ClairResult) -> Any:
        if result.by_module:
            return {m: getattr(module, name) for m, module in result.modules.items()}
        return getattr(result.modules[SINGLE], name)

    return property(read, doc=meaning)


@dataclass(frozen=True)
class ClairResult:
    """Verdict over all modules, and the results of each module.

    ``benign`` (K,) bool. ``scores`` (K,) say how far each client stands above the benign ones, in standard deviations
    of their log leave-one-out energy off the subspace. ``p_values`` (K,) are the chance that a benign client scores as
    high. The family-wise error is 1 % if no client is contaminated and noise variances are proportional to 1 / weights;
    a client with noisier data and no weight that says so looks contaminated. ``modules`` holds a `ModuleResult` by
    name, or a `ModuleSummary` if the refined updates are on disk.

    The fields of a module are properties here too, or dicts of them if the updates were given by module. Look at
    ``shared_structure`` first: if it is near 0, no shared subspace is visible; below ``MIN_EXPLAINED_VARIANCE`` in
    every module, nothing is refined.
    """

    names: list[str]
    benign: Any
    scores: Any
    p_values: Any
    modules: dict[str, Any]
    by_module: bool

    rank = _of_modules("rank", "Rank r of the shared subspace.")
    basis = _of_modules("basis", "Orthonormal basis U (p, r) of the shared subspace.")
    common_part = _of_modules("common_part", "Common part outside the subspace, P_perp M (p, q).")
    common = _of_modules("common_part", "Old name of ``common_part``; it will be removed in version 0.3.")
    refined = _of_modules("refined", "Refined updates, in the form of the input; contaminated clients hold their own.")
    truncation_errors = _of_modules("truncation_errors", "Relative Frobenius errors (K,) of the refined updates' rank.")
    gain = _of_modules("gain", "Estimated fraction of the local squared error that refinement removes.")
    shared_structure = _of_modules("shared_structure", "Explained variance of benign clients, see `ModuleSummary`.")
    certificate = _of_modules("certificate", "Duality gap of the convex program; None for the consensus solver.")

    @property
    def contaminated(self) -> list[str]:
        """Names of the contaminated clients."""
        return [name for name, ok in zip(self.names, self.benign.tolist(), strict=True) if not ok]

    @property
    def has_shared_subspace(self) -> bool:
        """Whether the explained variance reaches ``MIN_EXPLAINED_VARIANCE`` in any module."""
        return max(module.shared_structure for module in self.modules.values()) >= MIN_EXPLAINED_VARIANCE

    def summary(self) -> str:
        """Return the verdict and the modules as plain text."""
        bad = self.contaminated
        lines = [f"{len(bad)} of {len(self.names)} clients contaminated" + (f": {', '.join(bad)}" if bad else "")]
        if not self.has_shared_subspace:
            lines.append("no shared subspace found: the updates do not predict one another, so the verdict says little")
        width = max(len(name) for name in self.names)
        lines.append(f"{'client':<{width}}  verdict       score  p-value")
        columns = self.benign.tolist(), self.scores.tolist(), self.p_values.tolist()
        for name, ok, score, p in zip(self.names, *columns, strict=True):
            lines.append(f"{name:<{width}}  {'benign' if ok else 'contaminated':<12}  {score:5.1f}  {p:.2g}")
        for m in self.modules.values():
            found = f"rank {m.rank}, shared structure {m.shared_structure:.2f}"
            outcome = f"estimated gain {m.gain:.0%}" if m.is_refined else f"not refined, estimated gain {m.gain:.0%}"
            lines.append(f"{m.name} {m.shape[0]}x{m.shape[1]}: {found}, {outcome}")
            if m.certificate is not None:
                lines.append(f"  duality gap {m.certificate.relative_gap:.1e} ({m.certificate.iterations} iterations)")
        return "\n".join(lines)
