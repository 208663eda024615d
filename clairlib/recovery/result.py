"""What CLAIR returns: a verdict for every client, and for every module its subspace and the refined updates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from clairlib.recovery.convex import Certificate
from clairlib.recovery.inputs import SINGLE
from clairlib.recovery.leave_one_out import MIN_EXPLAINED_VARIANCE
from clairlib.recovery.refinement import Gain


@dataclass(frozen=True)
class ModuleSummary:
    """What is known of one weight matrix.

    ``shape`` (p, q); ``rank`` r; ``scores`` (K,) as in ClairResult, this module alone; ``gain`` the estimated share of
    the local squared error that refinement removes, ``gain_terms`` its parts; ``is_refined`` False where refinement was
    refused, because the gain is not positive or no module shares a subspace: clients then have their own updates;
    ``shared_structure``, in [0, 1], how much of the benign clients' variation the subspace predicts for a client that
    it has not seen, beyond chance; ``spectrum`` the singular values of the benign clients' centred stack, in which the
    rank shows as a drop; ``certificate`` of the convex program, None for the consensus solver.
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
    """One weight matrix, and what refinement makes of it.

    ``basis`` U (p, r), or (q, r) for side "input", unique up to rotation: compare subspaces with
    ``subspace.sin_theta``; ``common_part`` P_perp M (p, q); ``refined`` in the form of the input, a contaminated client's
    own update in its place.
    """

    basis: Any
    common_part: Any
    refined: Any


@dataclass(frozen=True)
class ClairResult:
    """Verdict over all modules, and the modules.

    ``benign`` (K,) bool; ``scores`` (K,) how far each client stands above the benign ones, in standard deviations of
    their log off-subspace energy, left one out; ``p_values`` (K,) chance that a benign client scores as high.
    The family-wise error of the verdict, 1 % when nobody is contaminated, supposes that clients' noise variances are
    proportional to 1 / weights: a client with noisier data and no weight to say so looks contaminated.
    ``rank``, ``basis``, ``common_part``, ``refined``, ``gain``, ``shared_structure`` and ``certificate`` are those of the
    module, or dicts by module where the updates were given by module. ``modules`` holds a `ModuleResult` each, or a
    `ModuleSummary` where the refined updates are on disk.
    """

    names: list[str]
    benign: Any
    scores: Any
    p_values: Any
    modules: dict[str, Any]
    by_module: bool

    def _of_modules(self, value: Callable[[ModuleResult], Any]) -> Any:
        return {m: value(r) for m, r in self.modules.items()} if self.by_module else value(self.modules[SINGLE])

    @property
    def rank(self) -> Any:
        """Rank r of the shared subspace."""
        return self._of_modules(lambda m: m.rank)

    @property
    def basis(self) -> Any:
        """Orthonormal basis U (p, r) of the shared subspace."""
        return self._of_modules(lambda m: m.basis)

    @property
    def common_part(self) -> Any:
        """Common part outside the subspace, P_perp M (p, q)."""
        return self._of_modules(lambda m: m.common_part)

    @property
    def common(self) -> Any:
        """Old name of ``common_part``; goes with version 0.3."""
        return self.common_part

    @property
    def refined(self) -> Any:
        """Refined updates, in the form of the input; contaminated clients hold their own update."""
        return self._of_modules(lambda m: m.refined)

    @property
    def gain(self) -> Any:
        """Estimated share of the local squared error that refinement removes."""
        return self._of_modules(lambda m: m.gain)

    @property
    def shared_structure(self) -> Any:
        """Share of the benign clients' variation that the subspace predicts for a client it has not seen, in [0, 1].

        Beyond chance. Look at it first: near 0 the adapters share no subspace that could be seen. Below
        ``MIN_EXPLAINED_VARIANCE`` in every module nothing is refined.
        """
        return self._of_modules(lambda m: m.shared_structure)

    @property
    def certificate(self) -> Any:
        """Duality gap of the convex program; None for the consensus solver."""
        return self._of_modules(lambda m: m.certificate)

    @property
    def contaminated(self) -> list[str]:
        """Names of the contaminated clients."""
        return [name for name, ok in zip(self.names, self.benign.tolist(), strict=True) if not ok]

    @property
    def has_shared_subspace(self) -> bool:
        """Does any module's subspace predict at least ``MIN_EXPLAINED_VARIANCE`` of an unseen benign client's variation?"""
        return max(module.shared_structure for module in self.modules.values()) >= MIN_EXPLAINED_VARIANCE

    def summary(self) -> str:
        """Verdict and modules as plain text."""
        bad = self.contaminated
        lines = [f"{len(bad)} of {len(self.names)} clients contaminated" + (f": {', '.join(bad)}" if bad else "")]
        if not self.has_shared_subspace:
            lines.append("no shared subspace found: the updates do not predict one another, so the verdict says little")
        width = max(len(name) for name in self.names)
        lines.append(f"{'client':<{width}}  verdict       score  p-value")
        rows = zip(self.names, self.benign.tolist(), self.scores.tolist(), self.p_values.tolist(), strict=True)
        for name, ok, score, p in rows:
            lines.append(f"{name:<{width}}  {'benign' if ok else 'contaminated':<12}  {score:5.1f}  {p:.2g}")
        for m in self.modules.values():
            found = f"rank {m.rank}, shared structure {m.shared_structure:.2f}"
            outcome = f"estimated gain {m.gain:.0%}" if m.is_refined else f"not refined, estimated gain {m.gain:.0%}"
            lines.append(f"{m.name} {m.shape[0]}x{m.shape[1]}: {found}, {outcome}")
            if m.certificate is not None:
                lines.append(f"  duality gap {m.certificate.relative_gap:.1e} ({m.certificate.iterations} iterations)")
        return "\n".join(lines)
