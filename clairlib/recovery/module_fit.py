"""One module during the fit: its cores, the frame and the scores of a set of clients, and the outcome for this set."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clairlib.linalg.compress import Compressed
from clairlib.linalg.grams import StackedFactors, stack
from clairlib.linalg.low_rank import Cores, LowRank
from clairlib.linalg.refined_factors import GUARD, SharedParts, shared_part
from clairlib.linalg.subspace import project_out
from clairlib.recovery.convex import Certificate
from clairlib.recovery.detection import calibrate
from clairlib.recovery.frame import Frame, fit_frame, keep_directions
from clairlib.recovery.inputs import Module
from clairlib.recovery.leave_one_out import LeaveOneOut
from clairlib.recovery.normalisation import client_scales, cut_tails
from clairlib.recovery.oddities import directions_of_few
from clairlib.recovery.refinement import Gain, estimate_gain
from clairlib.recovery.verdict import ModuleScores, wider_frame


class ModuleFit:
    """One module during the fit. Its cores are divided by ``size``, their largest entry, so that squares stay in range.

    The frame of the last requested set and its scores are remembered. ``stacked`` are the factors and
    ``expected_sq_error`` (K,) the expected errors, if known. Compressed cores are ``compressed_for`` a set (None: all).
    """

    def __init__(
        self, name: str, cores: Cores | Compressed, weights: Tensor, rank: int | None, *,
        compressed_for: Tensor | None = None, stacked: StackedFactors | None = None,
        expected_sq_error: Tensor | None = None, in_place: bool = False,
    ) -> None:
        self.name, self.cores, self.weights, self.rank, self.stacked = name, cores, weights, rank, stacked
        self.compressed_for, self.expected_sq_error = compressed_for, expected_sq_error
        self.size = float(cores.core.abs().max()) or 1.0
        self.X = cores.core / self.size
        self.scales = torch.ones_like(weights)
        self.in_place, self.weighted = in_place, bool((weights != 1).any())
        self._frame: Frame | None = None
        self._reading: tuple[ModuleScores, LeaveOneOut] | None = None

    def normalised(self, members: Tensor) -> ModuleFit:
        """Return the fit with clients divided by their sizes, as the frame of ``members`` (K,) bool shows them.

        Heavy rows of dense updates are cut as well (`cut_tails`). The same object if there is nothing to do.
        """
        left_out = LeaveOneOut(self.X, self.weights, self.frame(members))
        dof = left_out.benign.degrees_of_freedom(left_out.squares[members])
        scales = client_scales(self.X, left_out.frame, max(dof, 1.0))
        X = self.X / scales[:, None, None]
        if self.in_place:
            X = cut_tails(X, self.weights * scales.square(), left_out.frame)
        if torch.equal(X, self.X):
            return self
        fit = copy(self)
        fit.X, fit.scales, fit._frame, fit._reading = X, scales, None, None
        fit.weights = self.weights * scales.square()
        return fit

    def subset(self, chosen: Tensor) -> ModuleFit:
        """Return the fit of the clients ``chosen`` (K,) bool alone."""
        fit = copy(self)
        fit.X, fit.scales, fit.weights = self.X[chosen], self.scales[chosen], self.weights[chosen]
        fit._frame, fit._reading, fit.expected_sq_error = None, None, None
        return fit

    def suits(self, members: Tensor) -> bool:
        """Return whether the cores are the right ones if these clients (K,) bool are taken to be benign."""
        if isinstance(self.cores, Cores):
            return True
        return self.compressed_for is not None and torch.equal(self.compressed_for, members)

    def frame(self, members: Tensor) -> Frame:
        """Return the frame of a set of clients (K,) bool."""
        if self._frame is None or not torch.equal(self._frame.members, members):
            self._frame = fit_frame(self.X, self.weights, members, self.rank, self.cores.shared_block)
            self._reading = None
        return self._frame

    def reading(self, members: Tensor) -> ModuleScores:
        """Return the scores of all clients against the frame of a set of clients (K,) bool."""
        return self._read(members)[0]

    def _read(self, members: Tensor) -> tuple[ModuleScores, LeaveOneOut]:
        frame = self.frame(members)
        if self._reading is None:
            left_out = LeaveOneOut(self.X, self.weights, frame)
            self._reading = ModuleScores.of(left_out, self.rank), left_out
        return self._reading

    def wider_reading(self, members: Tensor) -> ModuleScores:
        """Return the scores of all clients against the `wider_frame` of the same set of clients (K,) bool."""
        wider = wider_frame(self.X, self.weights, self.frame(members))
        return ModuleScores.of(LeaveOneOut(self.X, self.weights, wider), self.rank)

    def outcome(self, members: Tensor) -> Outcome:
        """Return the outcome of the module if these clients (K,) bool are benign."""
        frame, (reading, left_out) = self.frame(members), self._read(members)
        z = calibrate(reading.scores, members, reading.variance).z
        kept = keep_directions(self.X, self.weights, frame) if self.rank is None else frame
        spectrum = self.size * frame.eigenvalues.clamp(min=0.0).sqrt()
        known = None
        if self.expected_sq_error is not None:
            known = float((self.weights * self.expected_sq_error)[members].mean()) / self.size**2
        ranks = self.cores.ranks if isinstance(self.cores, Compressed) else None
        gain = estimate_gain(self.X, self.weights, kept, known, left_out if kept is frame else None, ranks)
        few = directions_of_few(self.X, self.weights, frame)
        return Outcome(kept, z, gain, float(reading.structure), spectrum, reading.p_values, few)

    def residuals(self, members: Tensor) -> Tensor | None:
        """Return the leave-one-out residuals (K, p, q); None if own coordinates of clients cannot be compared."""
        return self._read(members)[1].R if isinstance(self.cores, Cores) else None

    def parts(self, frame: Frame, updates: Sequence[LowRank]) -> SharedParts:
        """Return subspace and common part of a frame; for compressed cores, from the factors of the ``updates``."""
        if isinstance(self.cores, Cores):
            off = self.cores.lift(self.size * project_out(frame.basis, frame.mean))
            return self.cores.lift_rows(frame.basis), off
        start = self.cores.left @ frame.eigenvectors[: self.cores.shared_block[0], : frame.rank + GUARD]
        stacked = self.stacked or stack(updates)
        return shared_part(stacked, frame.members, self.weights, start, frame.rank, self.scales)


@dataclass(frozen=True)
class Outcome:
    """Outcome of a module for a set of benign clients.

    ``frame`` with directions to keep; z ``scores`` (K,) of this module alone; ``gain`` in units of the cores;
    ``structure``, the members' explained variance; ``spectrum``, singular values of the members' centred stack;
    ``p_values`` (K,) of this module alone; ``few_users``, clients by direction that few of them use.
    """

    frame: Frame
    scores: Tensor
    gain: Gain
    structure: float
    spectrum: Tensor
    p_values: Tensor
    few_users: list[list[int]]

    def summary(
        self, fit: ModuleFit, module: Module, refine_any: bool, certificate: Certificate | None = None
    ) -> dict[str, Any]:
        """Return the fields of a `ModuleSummary`."""
        return {
            "name": module.name, "shape": module.shape[::-1] if module.transposed else module.shape,
            "rank": self.frame.rank, "scores": self.scores, "p_values": self.p_values, "sizes": fit.scales,
            "gain": self.gain.relative, "gain_terms": self.gain.scaled(fit.size * fit.size),
            "is_refined": self.is_refined(refine_any), "shared_structure": self.structure,
            "spectrum": self.spectrum.cpu().numpy(), "few_users": self.few_users, "certificate": certificate,
        }  # fmt: skip

    def is_refined(self, refine_any: bool) -> bool:
        """Return whether refinement is estimated to pay and ``refine_any``: clients share a subspace in some module."""
        return refine_any and self.gain.relative > 0
