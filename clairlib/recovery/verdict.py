"""One verdict over all modules: scores per module, pooled, and iterated until the set of benign clients stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clairlib.core.limits import MINIMUM_CLIENTS
from clairlib.linalg.rank import resolved_rank
from clairlib.recovery.detection import Calibration, benign_set, calibrate
from clairlib.recovery.frame import Frame, fit_frame, floor_energy, rank_limit
from clairlib.recovery.leave_one_out import LeaveOneOut, inside_energy, left_out_bases, log_scores, shared_structure


@dataclass(frozen=True)
class ModuleScores:
    """Scores of all clients against the frame of a set of clients in one module.

    ``scores`` (K,) are log scores, ``variance`` is the variance of one under pure noise, and ``inside`` (K,) are log
    energies inside the subspace. ``structure``, the members' `shared_structure`, is the module's weight in the verdict.
    """

    scores: Tensor
    variance: float
    inside: Tensor
    structure: Tensor

    @classmethod
    def of(cls, X: Tensor, weights: Tensor, frame: Frame) -> tuple[ModuleScores, LeaveOneOut]:
        """Score the updates X (K, p, q) against a frame of some of them; return the leave-one-out residuals as well."""
        bases = left_out_bases(X, weights, frame)
        left_out = LeaveOneOut.of(X, weights, frame, bases)
        scores, variance = log_scores(X, weights, frame, left_out)
        inside = inside_energy(X, weights, frame, bases).clamp(min=floor_energy(X)).log()
        return cls(scores, variance, inside, shared_structure(X, weights, frame, left_out)), left_out

    def cpu(self) -> ModuleScores:
        """Return these scores in main memory."""
        return ModuleScores(self.scores.cpu(), self.variance, self.inside.cpu(), self.structure.cpu())


def pool(readings: Sequence[ModuleScores]) -> tuple[Tensor, float, Tensor]:
    """Return every client's pooled log score (K,), its variance, and the pooled log energy inside the subspaces (K,).

    These are averages over modules (of independent noise), weighted by explained variance over noise variance.
    """
    structure = torch.stack([reading.structure for reading in readings])
    if not bool(structure.any()):  # the clients differ in no module: equal weights
        structure = torch.ones_like(structure)
    variances = structure.new_tensor([reading.variance for reading in readings])
    shares = structure / variances
    shares = shares / shares.sum()
    x = shares @ torch.stack([reading.scores for reading in readings])
    inside = shares @ torch.stack([reading.inside for reading in readings])
    return x, float((shares.square() * variances).sum()), inside


def judge(readings: Sequence[ModuleScores], members: Tensor) -> tuple[Tensor, Calibration]:
    """Return the benign clients (K,) bool and the pooled calibration, by scores against the frames of ``members``."""
    x, variance, inside = pool(readings)
    pooled = calibrate(x, members, variance)
    return benign_set(x, members, pooled.p_values, variance, inside), pooled


def vote(frames: Sequence[Frame], structure: Sequence[Tensor]) -> Tensor:
    """Return the clients (K,) bool in most sets, weighted by explained variance; if too few, the set of most weight."""
    if len(frames) == 1:
        return frames[0].members
    weights = torch.stack(list(structure))
    if not bool(weights.any()):
        weights = torch.ones_like(weights)
    votes = torch.stack([weight * frame.members for weight, frame in zip(weights, frames, strict=True)]).sum(dim=0)
    benign = votes * 2 > weights.sum()
    return benign if int(benign.sum()) >= MINIMUM_CLIENTS else frames[int(weights.argmax())].members


def iterate_verdict(
    benign: Tensor,
    read: Callable[[Tensor], Sequence[ModuleScores]],
    read_wider: Callable[[Tensor], Sequence[ModuleScores]] | None,
) -> tuple[Tensor, Calibration]:
    """Repeat the verdict, starting from ``benign`` (K,) bool, until the set stays; return the set and its calibration.

    ``read`` scores all clients against the frames of a set. ``read_wider`` scores them against a `wider_frame`, in
    enough modules to decide; it is None if the rank is given. A client that is benign by either of the two is benign.
    """
    tried: list[Tensor] = []
    while True:
        decided, pooled = judge(read(benign), benign)
        tried.append(benign)
        if read_wider is not None and not bool(decided.all()):
            decided = decided | judge(read_wider(benign), benign)[0]
        if int(decided.sum()) < MINIMUM_CLIENTS or any(torch.equal(decided, known) for known in tried):
            return benign, pooled
        benign = decided


def wider_frame(X: Tensor, weights: Tensor, frame: Frame) -> Frame:
    """Return the frame with one more direction, or with the rank estimated from all clients if that is larger.

    At most what the members support. A client that uses a direction they do not show would look foreign; a direction of
    noise too many hardly lowers a contaminated client's score.
    """
    everybody = fit_frame(X, weights, torch.ones_like(frame.members), shared_block=frame.shared_block)
    limit = rank_limit(frame.size, frame.shared_block[0], X.shape[2])
    seen = min(limit, resolved_rank(frame.eigenvalues))  # directions beyond are arbitrary
    rank = min(max(frame.rank + 1, everybody.rank), max(frame.rank, seen))
    return fit_frame(X, weights, frame.members, rank, frame.shared_block)
