"""Leave-one-out residuals of every client, and the scores and explained variance computed from them.

A member's residual is taken from a subspace and a mean that are fitted without this member. Clients come as a float64
stack X (K, p, q) with weights w (K,), as in `clairlib.recovery.frame`.
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

NO_EXPLAINED_VARIANCE = 1e-3  # smallest explained variance that is returned for clients that differ
MIN_EXPLAINED_VARIANCE = 0.1  # unrelated clients and very noisy clients stay below; above, the subspace predicts
# Prior standard deviation of the exponent with which an update's residual energy grows with the update's energy.
SIZE_EXPONENT_PRIOR_STD = 0.5
# A contaminated client differs by r directions of its own and by its common part, so 2 r directions are scored.
SCORED_DIRECTIONS_PER_RANK = 2


def leave_one_out(X: Tensor, weights: Tensor, frame: Frame, bases: Tensor | None = None) -> Tensor:
    """Return the leave-one-out residuals off the subspace (K, p, q) of every client, all on one scale.

    A member is compared with the frame refitted without it, a non-member with the frame itself: R_k = P_perp (X_k - M)
    / sqrt(1 / w_k + 1 / W), where W is the total weight behind M. Under benign noise of variance sigma^2 / w_k every
    entry then has variance sigma^2, apart from the error of P. In-sample residuals would make every non-member look
    foreign. ``bases`` are the `left_out_bases`, if they are known.
    """
    inside, W, w = frame.members, weights[frame.members].sum(), weights
    D = centred(X, weights, frame)
    R = torch.empty_like(X)
    scale = (1 / w[~inside] + 1 / W).rsqrt()
    R[~inside] = project_out(frame.basis, D[~inside]) * scale[:, None, None]
    loss = w[inside] * W / (W - w[inside])  # X_k - M_(-k) = D_k W / (W - w_k)
    bases = left_out_bases(X, weights, frame) if bases is None else bases
    R[inside] = project_out(bases, D[inside]) * loss.sqrt()[:, None, None]
    return R


def left_out_bases(X: Tensor, weights: Tensor, frame: Frame) -> Tensor:
    """Return the bases (n, p, r) of the subspaces fitted without each of the n members."""
    bases = downdated_bases(frame.eigenvalues.clamp(min=0.0), member_loads(X, weights, frame), frame.rank)
    return frame.eigenvectors @ bases


def inside_energy(X: Tensor, weights: Tensor, frame: Frame, bases: Tensor | None = None) -> Tensor:
    """Return the energy (K,) of every update inside the subspace; a member's subspace is fitted without it."""
    energy = torch.empty_like(X[:, 0, 0])
    energy[~frame.members] = (frame.basis.T @ X[~frame.members]).square().sum(dim=(1, 2))
    bases = left_out_bases(X, weights, frame) if bases is None else bases
    energy[frame.members] = (bases.mT @ X[frame.members]).square().sum(dim=(1, 2))
    return energy


def filtered_energy(R: Tensor, rank: int) -> Tensor:
    """Return residuals' energy (K,) in the top ``SCORED_DIRECTIONS_PER_RANK * rank`` directions, a matched filter."""
    return _top_energy(squared_singular_values(R), rank)


def _top_energy(squares: Tensor, rank: int) -> Tensor:
    return squares[:, : max(SCORED_DIRECTIONS_PER_RANK * rank, 1)].sum(dim=1)


@dataclass(frozen=True)
class LeaveOneOut:
    """Leave-one-out residuals ``R`` (K, p, q) of all clients from the ``frame``, and quantities derived from them."""

    R: Tensor
    frame: Frame

    @classmethod
    def of(cls, X: Tensor, weights: Tensor, frame: Frame, bases: Tensor | None = None) -> LeaveOneOut:
        """Compute the residuals; arguments as for `leave_one_out`."""
        return cls(leave_one_out(X, weights, frame, bases), frame)

    @cached_property
    def squares(self) -> Tensor:
        """Squared singular values (K, min(p, q)) of the residuals, descending."""
        return squared_singular_values(self.R)

    @cached_property
    def benign(self) -> EffectiveDimensions:
        """Distribution of the members' residuals over rows and columns."""
        return EffectiveDimensions(self.R[self.frame.members], self.frame.shared_block)


def log_scores(X: Tensor, weights: Tensor, frame: Frame, left_out: LeaveOneOut | None = None) -> tuple[Tensor, float]:
    """Return the log scores (K,), and the variance of a log score under pure noise.

    A log score is the log of a client's filtered leave-one-out energy, corrected for the size of its update
    (`without_size`). The variance is 2 / dof, with the degrees of freedom of the members' residuals; it is a prior
    scale for small sets, not the distribution of the score. ``left_out`` are the residuals, if they are known.
    """
    left_out = left_out or LeaveOneOut.of(X, weights, frame)
    energy = _top_energy(left_out.squares, frame.rank).clamp(min=floor_energy(X))
    variance = 2.0 / max(left_out.benign.degrees_of_freedom(left_out.squares[frame.members]), 1.0)
    sizes = X.square().sum(dim=(1, 2)).clamp(min=floor_energy(X)).log()
    return without_size(energy.log(), sizes, frame.members, variance), variance


def without_size(x: Tensor, sizes: Tensor, members: Tensor, variance: float) -> Tensor:
    """Return the log scores (K,) less the part that the log energies ``sizes`` (K,) of the updates explain.

    The tilted subspace leaves out more of a larger update, and the noise of a trained adapter grows with its size. The
    slope is that of the members' scores on their sizes, in [0, 1], by ridge regression with prior standard deviation
    ``SIZE_EXPONENT_PRIOR_STD`` around 0. Sizes are clamped to the range of the members' sizes, so no client can hide a
    foreign part behind a large part in the subspace.
    """
    own = sizes[members]
    deviation = sizes.clamp(own.min(), own.max()) - own.mean()
    product = torch.where(members, (x - x[members].mean()) * deviation, 0.0)
    square = torch.where(members, deviation.square(), 0.0)
    # a member's slope is fitted to the other members
    slope = (product.sum() - product) / (square.sum() - square + variance / SIZE_EXPONENT_PRIOR_STD**2)
    return x - slope.clamp(0.0, 1.0) * deviation


def shared_structure(X: Tensor, weights: Tensor, frame: Frame, left_out: LeaveOneOut | None = None) -> Tensor:
    """Return the explained variance of the members beyond chance, in [0, 1], by leave-one-out prediction.

    1 - (leave-one-out energy of P_perp D) / (leave-one-out energy of D) - r / (p_eff + r). The last term is the part
    that any r directions explain of pure noise. It is 0 if the members do not differ, otherwise at least
    ``NO_EXPLAINED_VARIANCE``, so that modules without structure count if there are no others.
    """
    benign = (left_out or LeaveOneOut.of(X, weights, frame)).benign
    w, W = weights[frame.members], weights[frame.members].sum()
    D = centred(X, weights, frame)[frame.members].square().sum(dim=(1, 2))
    total = (D * w * W / (W - w)).sum()
    if total <= floor_energy(X) * frame.size:
        return total.new_zeros(())
    p_eff, _ = benign.effective_dimensions()
    return (1 - benign.R.square().sum() / total - frame.rank / (p_eff + frame.rank)).clamp(min=NO_EXPLAINED_VARIANCE)
