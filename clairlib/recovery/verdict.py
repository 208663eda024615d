"""One verdict over all modules: how the clients stand to the frame of a set in each, pooled, and the set that stays."""

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
    """How the clients stand to the frame of a set in one module.

    ``scores`` (K,) log scores and the ``variance`` they have under pure noise; ``inside`` (K,) log energies in the
    subspace; ``structure``, the members' shared structure, which is the module's weight in the verdict.
    """

    scores: Tensor
    variance: float
    inside: Tensor
    structure: Tensor

    @classmethod
    def of(cls, X: Tensor, weights: Tensor, frame: Frame) -> tuple[ModuleScores, LeaveOneOut]:
        """Of the updates X (K, p, q) and a frame of some of them; with the residuals left one out."""
        bases = left_out_bases(X, weights, frame)
        left_out = LeaveOneOut.of(X, weights, frame, bases)
        scores, variance = log_scores(X, weights, frame, left_out)
        inside = inside_energy(X, weights, frame, bases).clamp(min=floor_energy(X)).log()
        return cls(scores, variance, inside, shared_structure(X, weights, frame, left_out)), left_out

    def cpu(self) -> ModuleScores:
        """The same in main memory."""
        return ModuleScores(self.scores.cpu(), self.variance, self.inside.cpu(), self.structure.cpu())


def pool(readings: Sequence[ModuleScores]) -> tuple[Tensor, float, Tensor]:
    """Pooled log score of every client (K,), its variance, and the pooled log energy inside the subspaces (K,).

    Averages over modules, weighted by shared structure over noise variance: with one module, that module's. The
    variance takes the modules' noise as independent.
    """
    structure = torch.stack([reading.structure for reading in readings])
    if not bool(structure.any()):  # the clients differ in no module: all count alike
        structure = torch.ones_like(structure)
    variances = structure.new_tensor([reading.variance for reading in readings])
    shares = structure / variances
    shares = shares / shares.sum()
    x = shares @ torch.stack([reading.scores for reading in readings])
    inside = shares @ torch.stack([reading.inside for reading in readings])
    return x, float((shares.square() * variances).sum()), inside


def judge(readings: Sequence[ModuleScores], members: Tensor) -> tuple[Tensor, Calibration]:
    """The benign clients (K,) bool by readings from the frames of ``members``, and everybody's pooled calibration."""
    x, variance, inside = pool(readings)
    pooled = calibrate(x, members, variance)
    return benign_set(x, members, pooled.p_values, variance, inside), pooled


def vote(frames: Sequence[Frame], structure: Sequence[Tensor]) -> Tensor:
    """The first set (K,) bool: members in most modules, weighted by shared structure."""
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
    """The set that stays when it is judged by its own frames, from ``benign`` (K,) bool, and the calibration on it.

    ``read`` gives the readings of a set by its frames, ``read_wider`` by frames of more directions (`wider_frame`) in modules
    enough to tell: who is benign by either is benign. None where the rank is given.
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
    """The frame with one more direction, or the rank estimated from all clients, as far as its members support it.

    A few clients may show fewer directions than they share, and whoever uses the others looks foreign to them. A
    direction too many is one of the noise, and takes next to nothing from the score of a contaminated client.
    """
    everybody = fit_frame(X, weights, torch.ones_like(frame.members), shared_block=frame.shared_block)
    limit = rank_limit(frame.size, frame.shared_block[0], X.shape[2])
    seen = min(limit, resolved_rank(frame.eigenvalues))  # beyond, arbitrary directions
    rank = min(max(frame.rank + 1, everybody.rank), max(frame.rank, seen))
    return fit_frame(X, weights, frame.members, rank, frame.shared_block)
