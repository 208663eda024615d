"""One verdict over all modules: scores per module, pooled, and iterated until the set of benign clients stays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from clairlib.core.limits import MINIMUM_CLIENTS
from clairlib.linalg.rank import resolved_rank
from clairlib.recovery.detection import FAMILY_ERROR, Calibration, benign_set, calibrate, simes_cut
from clairlib.recovery.frame import Frame, fit_frame, rank_limit
from clairlib.recovery.leave_one_out import LeaveOneOut
from clairlib.recovery.normalisation import CommonParts, common_share
from clairlib.recovery.scores import LEAST_VARIANCE, log_scores, scored_energies

LACK_ERROR = 0.0025  # family-wise level of the test for the common part, a quarter of FAMILY_ERROR
SUSPECT_ERROR = 0.01  # a member with a smaller p-value in a module does not shape the frame by which the module judges


@dataclass(frozen=True)
class ModuleScores:
    """Scores of all clients against the frame of a set of clients in one module.

    ``scores`` (K,) are log scores, ``variance`` is the variance of one under pure noise, and ``inside`` (K,) are log
    energies inside the subspace. ``structure``, the members' explained variance, is the module's weight in the verdict.
    ``p_values`` (K,) are those of this module alone (`module_p_values`). ``noise`` (K,) is the log of the energy in the
    scored directions over that of the update. ``common`` is the part of the members' energy off the subspace that
    their common part holds. ``lack`` (K,) is how much of it a client lacks, and ``lack_variance`` (K,) its variance.
    """

    scores: Tensor
    variance: float
    inside: Tensor
    structure: Tensor
    p_values: Tensor
    noise: Tensor
    lack: Tensor
    lack_variance: Tensor
    common: float

    @classmethod
    def of(cls, left_out: LeaveOneOut, rank: int | None = None) -> ModuleScores:
        """Score the clients against a frame of some of them; ``rank`` is that asked for, None if it is estimated."""
        scores, variance = log_scores(left_out)
        own = module_p_values(left_out, rank)
        sizes = left_out.X.square().sum(dim=(1, 2)) / left_out.scale.square()
        noise = scored_energies(left_out)[0] - sizes.clamp(min=left_out.floor).log()
        structure, common = left_out.explained_variance, common_share(left_out.X, left_out.frame)
        dof = max(left_out.benign.degrees_of_freedom(left_out.squares[left_out.frame.members]), 1.0)
        parts = CommonParts.of(left_out.X, left_out.frame, dof)
        nothing = torch.zeros_like(scores), torch.full_like(scores, torch.inf)
        lack = nothing if parts is None else parts.lack()
        return cls(scores, variance, left_out.inside, structure, own, noise, *lack, common)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def cpu(self) -> ModuleScores:
        """Return these scores in main memory."""
        moved: dict[str, Any] = {name: value.cpu() for name, value in self.tensors.items()}
        return replace(self, **moved)


def module_p_values(left_out: LeaveOneOut, rank: int | None) -> Tensor:
    """Return the p-values (K,) of all clients in one module, by a frame that its own suspects do not shape.

    From the frame of the members, members with a p-value below ``SUSPECT_ERROR`` leave it until none does, and at most
    half of them. The larger of the p-values by this frame and by the `wider_frame` counts.
    """
    X, weights, frame = left_out.X, left_out.weights, left_out.frame
    least, members = max(MINIMUM_CLIENTS, (frame.size + 1) // 2), frame.members
    while True:
        scores, variance = log_scores(left_out)
        p_values = calibrate(scores, members, variance).p_values
        kept = members & (p_values >= SUSPECT_ERROR)
        if torch.equal(kept, members) or int(kept.sum()) < least:
            break
        members = kept
        left_out = LeaveOneOut(X, weights, fit_frame(X, weights, members, rank, frame.shared_block))
    if rank is None and bool((p_values < SUSPECT_ERROR).any()):
        scores, variance = log_scores(LeaveOneOut(X, weights, wider_frame(X, weights, left_out.frame)))
        p_values = torch.maximum(p_values, calibrate(scores, members, variance).p_values)
    return p_values


def pool(readings: Sequence[ModuleScores]) -> tuple[Tensor, float, Tensor]:
    """Return every client's pooled log score (K,), its variance, and the pooled log energy inside the subspaces (K,).

    These are averages over modules (of independent noise), weighted by explained variance over noise variance.
    """
    shares = module_shares(readings)
    variances = shares.new_tensor([reading.variance for reading in readings])
    x = shares @ torch.stack([reading.scores for reading in readings])
    inside = shares @ torch.stack([reading.inside for reading in readings])
    return x, float((shares.square() * variances).sum()), inside


def module_shares(readings: Sequence[ModuleScores]) -> Tensor:
    """Return the modules' shares (L,) in the pooled score: explained variance over noise variance, with sum one."""
    structure = torch.stack([reading.structure for reading in readings])
    if not bool(structure.any()):  # the clients differ in no module: equal weights
        structure = torch.ones_like(structure)
    shares = structure / structure.new_tensor([reading.variance for reading in readings])
    return shares / shares.sum()


def judge(readings: Sequence[ModuleScores], members: Tensor) -> tuple[Tensor, Calibration]:
    """Return the benign clients (K,) bool and the pooled calibration, by scores against the frames of ``members``."""
    x, variance, inside = pool(readings)
    pooled = calibrate(x, members, variance)
    benign = benign_set(x, members, pooled.p_values, variance, inside)
    return benign & ~found_apart(readings), pooled


def found_apart(readings: Sequence[ModuleScores]) -> Tensor:
    """Return the clients (K,) bool that a single module finds, or that lack the common part of the members."""
    return found_in_modules(readings).any(dim=0) | lacks_common_part(readings)


def lacks_common_part(readings: Sequence[ModuleScores]) -> Tensor:
    """Return whether each client (K,) bool lacks the common part, over all modules, by Simes' test at ``LACK_ERROR``.

    Means of 1 - a_k, weighted by their precision, are compared with a normal distribution, from one side. A client
    that sends something unrelated has a_k = 0, one that sends the negative a_k = -1, whatever its level of noise.
    """
    weights = torch.stack([1 / reading.lack_variance.clamp(min=LEAST_VARIANCE**2) for reading in readings])
    lack = torch.stack([reading.lack for reading in readings])
    z = (weights * lack).sum(dim=0) / weights.sum(dim=0).clamp(min=torch.finfo(lack.dtype).tiny).sqrt()
    p_values = torch.special.ndtr(-z)
    return p_values <= simes_cut(p_values, LACK_ERROR)


def found_in_modules(readings: Sequence[ModuleScores]) -> Tensor:
    """Return whether each module by itself finds each client contaminated, (L, K) bool; never if it is the only module.

    The level is Bonferroni's over clients and modules: ``FAMILY_ERROR`` / (K L).
    """
    p_values = torch.stack([reading.p_values for reading in readings])
    if len(readings) == 1:
        return torch.zeros_like(p_values, dtype=torch.bool)
    return p_values <= FAMILY_ERROR / p_values.numel()


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
        readings = read(benign)
        decided, pooled = judge(readings, benign)
        tried.append(benign)
        if read_wider is not None and not bool(decided.all()):
            wider = read_wider(benign)
            decided = (decided | judge(wider, benign)[0]) & ~found_apart(readings)
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
