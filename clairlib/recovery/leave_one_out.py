"""Residuals of every client from a subspace and mean that it had no part in, and what scores are made of.

Clients come as a float64 stack X (K, p, q) with weights w (K,), as in `clairlib.recovery.frame`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from clairlib.linalg.downdating import downdated_bases
from clairlib.linalg.subspace import project_out, squared_singular_values
from clairlib.recovery.effective_dimensions import EffectiveDimensions
from clairlib.recovery.frame import Frame, centred, floor_energy, member_loads

NO_EXPLAINED_VARIANCE = 1e-3  # stands for no structure at all among clients that differ
MIN_EXPLAINED_VARIANCE = 0.1  # strangers and very noisy clients stay below; above, the subspace predicts
SIZE_EXPONENT_PRIOR_STD = 0.5  # of the power of its size with which an update's residual energy grows
SCORED_DIRECTIONS_PER_RANK = 2  # a contaminated client differs by r directions of its own and by its common part


def leave_one_out(X: Tensor, weights: Tensor, frame: Frame, bases: Tensor | None = None) -> Tensor:
    """Off-subspace residuals (K, p, q) of every client from a frame that it had no part in, on one scale.

    A member is compared with the frame refitted without it, an outsider with the frame itself:
    R_k = P_perp (X_k - M) / sqrt(1 / w_k + 1 / W), W the total weight behind M, so that under benign noise of
    variance sigma^2 / w_k every entry has variance sigma^2, apart from the error of P. In-sample residuals would be
    too small for members and make every outsider look foreign. ``bases`` are the `left_out_bases`, where known.
    """
    inside, W, w = frame.members, weights[frame.members].sum(), weights
    D = centred(X, weights, frame)
    R = torch.empty_like(X)
    outside = ~inside
    scale = (1 / w[outside] + 1 / W).rsqrt()
    R[outside] = project_out(frame.basis, D[outside]) * scale[:, None, None]
    # X_k - M_(-k) = D_k W / (W - w_k)
    loss = w[inside] * W / (W - w[inside])
    bases = left_out_bases(X, weights, frame) if bases is None else bases
    R[inside] = project_out(bases, D[inside]) * loss.sqrt()[:, None, None]
    return R

def left_out_bases(X: Tensor, weights: Tensor, frame: Frame) -> Tensor:
    """Bases (n, p, r) of the subspaces fitted without each of the members."""
    bases = downdated_bases(frame.eigenvalues.clamp(min=0.0), member_loads(X, weights, frame), frame.rank)
    return frame.eigenvectors @ bases

def inside_energy(X: Tensor, weights: Tensor, frame: Frame, bases: Tensor | None = None) -> Tensor:
    """Energy (K,) of every update in the subspace; for a member, in the one fitted without it."""
    energy = torch.empty_like(X[:, 0, 0])
    outside = ~frame.members
    energy[outside] = (frame.basis.T @ X[outside]).square().sum(dim=(1, 2))
    bases = left_out_bases(X, weights, frame) if bases is None else bases
    energy[frame.members] = (bases.mT @ X[frame.members]).square().sum(dim=(1, 2))
    return energy

def filtered_energy(R: Tensor, rank: int) -> Tensor:
    """Energy of each residual (K, p, q) in its top ``SCORED_DIRECTIONS_PER_RANK * rank`` singular directions, at least one.

    A matched filter: contamination is low-rank, estimation noise fills every direction.
    """
    return _top_energy(squared_singular_values(R), rank)

def _top_energy(squares: Tensor, rank: int) -> Tensor:
    return squares[:, : max(SCORED_DIRECTIONS_PER_RANK * rank, 1)].sum(dim=1)

@dataclass(frozen=True)
class LeaveOneOut:
    """Residuals left one out ``R`` (K, p, q) of all clients from the ``frame``, and what is asked of them."""

    R: Tensor
    frame: Frame

    @classmethod
    def of(cls, X: Tensor, weights: Tensor, frame: Frame, bases: Tensor | None = None) -> LeaveOneOut:
        """As `leave_one_out`."""
        return cls(leave_one_out(X, weights, frame, bases), frame)

    @cached_property
    def squares(self) -> Tensor:
        """Squared singular values (K, min(p, q)), descending."""
        return squared_singular_values(self.R)

    @cached_property
    def benign(self) -> EffectiveDimensions:
        """How the members' residuals spread."""
        return EffectiveDimensions(self.R[self.frame.members], self.frame.shared_block)

def log_scores(X: Tensor, weights: Tensor, frame: Frame, left_out: LeaveOneOut | None = None) -> tuple[Tensor, float]:
    """Log of every client's filtered leave-one-out energy (K,), and the variance its log has under pure noise.

    The variance is 2 / dof with the degrees of freedom of the members' residuals. It is a scale for small sets, not
    the law of the score. ``left_out`` are the residuals, where known.
    """
    left_out = left_out or LeaveOneOut.of(X, weights, frame)
    energy = _top_energy(left_out.squares, frame.rank).clamp(min=floor_energy(X))
    variance = 2.0 / max(left_out.benign.degrees_of_freedom(left_out.squares[frame.members]), 1.0)
    sizes = X.square().sum(dim=(1, 2)).clamp(min=floor_energy(X)).log()
    return without_size(energy.log(), sizes, frame.members, variance), variance

def without_size(x: Tensor, sizes: Tensor, members: Tensor, variance: float) -> Tensor:
    """Log scores (K,) without what the log energies ``sizes`` (K,) of the updates explain of them.

    The subspace is tilted by estimation and leaves out more of a larger update; and noise of a trained adapter grows
    with it. The slope is that of the members' scores on their sizes, in [0, 1], by ridge regression with prior standard
    deviation ``SIZE_EXPONENT_PRIOR_STD`` around 0. An outsider's size counts no further than those of the members go: nobody hides a
    foreign part behind a large one.
    """
    own = sizes[members]
    deviation = sizes.clamp(own.min(), own.max()) - own.mean()
    product = torch.where(members, (x - x[members].mean()) * deviation, 0.0)  # a member's slope is that of the others
    square = torch.where(members, deviation.square(), 0.0)
    slope = (product.sum() - product) / (square.sum() - square + variance / SIZE_EXPONENT_PRIOR_STD**2)
    return x - slope.clamp(0.0, 1.0) * deviation

def shared_structure(X: Tensor, weights: Tensor, frame: Frame, left_out: LeaveOneOut | None = None) -> Tensor:
    """How much of the members' variation the subspace predicts for a client it has not seen, beyond chance; in [0, 1].

    1 - (energy of P_perp D left one out) / (energy of D left one out) less r / (p_eff + r), the part that any r
    directions of the noise take. 0 where the members do not differ; elsewhere at least ``NO_EXPLAINED_VARIANCE``, so that
    modules without structure still count when there are no others. ``left_out`` are the residuals, where known.
    """
    benign = (left_out or LeaveOneOut.of(X, weights, frame)).benign
    w, W = weights[frame.members], weights[frame.members].sum()
    D = centred(X, weights, frame)[frame.members].square().sum(dim=(1, 2))
    total = (D * w * W / (W - w)).sum()
    if total <= floor_energy(X) * frame.size:
        return total.new_zeros(())
    p_eff, _ = benign.effective_dimensions()
    return (1 - benign.R.square().sum() / total - frame.rank / (p_eff + frame.rank)).clamp(min=NO_EXPLAINED_VARIANCE)
