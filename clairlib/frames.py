"""Frames: a subspace with an off-subspace common part, fitted to a set of clients, and residuals left one out.

The output side is the row side (p). Clients come as a float64 stack X (K, p, q) with weights w (K,): the noise
variance of client k is proportional to 1 / w_k. The first rows and columns are coordinates that all clients have in
``common``; the rest, where there are any, are each client's own, orthogonal to those of all others: what is there has
no part in the subspace, and in the mean of the members only through the client itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from clairlib.dimensions import Common, Spread
from clairlib.downdate import downdated_bases, held_out_energies
from clairlib.subspace import (
    EDGE_SPAN,
    estimate_rank,
    gap_rank,
    held_out_rank,
    project_out,
    resolved_rank,
    squared_singular_values,
)

LEAST_STRUCTURE = 1e-3  # stands for no structure at all among clients that differ
LITTLE_STRUCTURE = 0.1  # strangers and very noisy clients stay below; from here on the subspace predicts something
ROUNDING_ENERGY = 1e-20  # energies below this part of the mean client's are rounding, not signal
SLOPE = 0.5  # prior standard deviation of the power of its size with which an update's residual energy grows
FILTER = 2  # a contaminated client differs by r directions of its own and by its common part: 2 r directions are scored


@dataclass(frozen=True)
class Frame:
    """An r-frame (P, C) fitted to ``members``.

    ``basis`` U (p, r) with P = U U' (unique up to rotation of its columns), ``mean`` the weighted mean M (p, q) of the
    members (C = P_perp M), ``eigenvalues`` (p,) of their weighted centred scatter, descending, and its eigenvectors
    (p, p), of which the basis is the first r. ``common`` (rows, columns) that all clients share: mean, eigenvalues and
    eigenvectors are of these, and zero elsewhere.
    """

    members: Tensor
    basis: Tensor
    mean: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor
    common: Common

    @property
    def rank(self) -> int:
        """Dimension r of the subspace."""
        return self.basis.shape[1]

    @property
    def size(self) -> int:
        """Number of members."""
        return int(self.members.sum())


def rank_limit(members: int, p: int, q: int) -> int:
    """Largest rank that ``members`` clients can support when each is left out in turn, and at most p - 1."""
    return max(0, min(p - 1, (members - 2) * q, (members - 1) * q // 2 + 1))


def fit_frame(
    X: Tensor, weights: Tensor, members: Tensor, rank: int | None = None, common: Common | None = None
) -> Frame:
    """Frame of a set of clients: weighted mean, and the leading eigenvectors of the centred scatter.

    scatter = sum_k w_k (X_k - M)(X_k - M)'. ``rank=None`` estimates the rank; ``common=None`` is all of p and q.
    """
    rows, columns = common = common or (X.shape[1], X.shape[2])
    w = weights[members]
    mean = torch.zeros_like(X[0])
    mean[:rows, :columns] = torch.einsum("k,kpq->pq", w / w.sum(), X[members, :rows, :columns])
    D = _less_mean(X[members], w / w.sum(), mean, common)
    D, own = D[:, :rows], D[:, rows:]
    values, vectors = torch.linalg.eigh(_gram(D * w.sqrt()[:, None, None]))
    values, vectors = values.flip(0), vectors.flip(1)
    if rank is None:
        rank = _rank(D, values, bool(own.any()))
    vectors = torch.nn.functional.pad(vectors, (0, 0, 0, X.shape[1] - rows))
    return Frame(members, vectors[:, :rank], mean, values, vectors, common)


def _less_mean(X: Tensor, shares: Tensor, mean: Tensor, common: Common) -> Tensor:
    """X_k - M of clients that have these ``shares`` (K,) in the mean: all of what it has in their own coordinates."""
    D = X - mean
    rows, columns = common
    if common != X.shape[1:]:
        kept = (1 - shares)[:, None, None]
        D[:, rows:] *= kept
        D[:, :rows, columns:] *= kept
    return D


def centred(X: Tensor, weights: Tensor, frame: Frame) -> Tensor:
    """X_k - M (K, p, q); a client that is no member has no share in M."""
    W = weights[frame.members].sum()
    return _less_mean(X, torch.where(frame.members, weights / W, 0.0), frame.mean, frame.common)


def keep_directions(X: Tensor, weights: Tensor, frame: Frame) -> Frame:
    """The frame with the directions that its members should keep of their own.

    Those of the gap that ends the spectrum. Where there is none, those that hold more signal than noise in clients held
    out: the verdict is better off with few directions, a client with all that pay.
    """
    if gap_rank(frame.eigenvalues[: resolved_rank(frame.eigenvalues)], frame.rank) == frame.rank:
        return frame
    largest = min(rank_limit(frame.size, frame.common[0], X.shape[2]), resolved_rank(frame.eigenvalues))
    energies = held_out_energies(frame.eigenvalues.clamp(min=0.0), _loads(X, weights, frame))
    rank = max(frame.rank, held_out_rank(energies, largest))
    return frame if rank == frame.rank else replace(frame, basis=frame.eigenvectors[:, :rank])


def _gram(D: Tensor) -> Tensor:
    return torch.einsum("kpq,krq->pr", D, D)


def _loads(X: Tensor, weights: Tensor, frame: Frame) -> Tensor:
    """E_k (n, p, q) of the members, in the scatter's eigenvectors: it loses E_k E_k' when the frame does without k."""
    w = weights[frame.members]
    loss = (w * w.sum() / (w.sum() - w)).sqrt()  # of w_k W / (W - w_k) D_k D_k'
    return frame.eigenvectors.T @ centred(X, weights, frame)[frame.members] * loss[:, None, None]


def _rank(D: Tensor, values: Tensor, own: bool) -> int:
    """Rank of centred blocks D (n, p, q), scatter eigenvalues ``values``; ``own``: do clients have other rows as well?

    Where every client lies in what the others span, there is no noise, and all of it is shared. The noise of low-rank
    adapters is confined as well, to as many directions as their ranks add up to, but each brings its own, and so does
    a client that shares nothing; then the gap is sought among the directions that are there.
    """
    n, p, q = D.shape
    resolved, limit = resolved_rank(values), rank_limit(n, p, q)
    if not own and resolved <= limit and resolved < min(p, (n - 1) * q):
        others = [_gram(rest - rest.mean(dim=0)) for rest in (torch.cat([D[:k], D[k + 1 :]]) for k in range(n))]
        if all(resolved_rank(values) == resolved for values in torch.linalg.eigvalsh(torch.stack(others)).flip(1)):
            return resolved
    if own:  # the last directions in common are there for the common part, or for the few clients that have them
        resolved, limit = min(resolved, p // 2 + EDGE_SPAN), min(limit, p // 2)
    return estimate_rank(values[:resolved], limit)


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
    bases = downdated_bases(frame.eigenvalues.clamp(min=0.0), _loads(X, weights, frame), frame.rank)
    return frame.eigenvectors @ bases


def inside_energy(X: Tensor, weights: Tensor, frame: Frame, bases: Tensor | None = None) -> Tensor:
    """Energy (K,) of every update in the subspace; for a member, in the one fitted without it."""
    energy = torch.empty_like(X[:, 0, 0])
    outside = ~frame.members
    energy[outside] = (frame.basis.T @ X[outside]).square().sum(dim=(1, 2))
    bases = left_out_bases(X, weights, frame) if bases is None else bases
    energy[frame.members] = (bases.mT @ X[frame.members]).square().sum(dim=(1, 2))
    return energy


def floor_energy(X: Tensor) -> float:
    """Energy below which a residual counts as exactly zero: rounding of the mean client's energy."""
    energy = float(torch.linalg.vector_norm(X)) ** 2 / len(X)
    return max(ROUNDING_ENERGY * energy, torch.finfo(torch.float64).tiny)


def filtered_energy(R: Tensor, rank: int) -> Tensor:
    """Energy of each residual (K, p, q) in its top ``FILTER * rank`` singular directions, at least one.

    A matched filter: contamination is low-rank, estimation noise fills every direction.
    """
    return _top_energy(squared_singular_values(R), rank)


def _top_energy(squares: Tensor, rank: int) -> Tensor:
    return squares[:, : max(FILTER * rank, 1)].sum(dim=1)


@dataclass(frozen=True)
class LeftOut:
    """Residuals left one out ``R`` (K, p, q) of all clients from the ``frame``, and what is asked of them."""

    R: Tensor
    frame: Frame

    @classmethod
    def of(cls, X: Tensor, weights: Tensor, frame: Frame, bases: Tensor | None = None) -> LeftOut:
        """As `leave_one_out`."""
        return cls(leave_one_out(X, weights, frame, bases), frame)

    @cached_property
    def squares(self) -> Tensor:
        """Squared singular values (K, min(p, q)), descending."""
        return squared_singular_values(self.R)

    @cached_property
    def benign(self) -> Spread:
        """How the members' residuals spread."""
        return Spread(self.R[self.frame.members], self.frame.common)


def log_scores(X: Tensor, weights: Tensor, frame: Frame, left_out: LeftOut | None = None) -> tuple[Tensor, float]:
    """Log of every client's filtered leave-one-out energy (K,), and the variance its log has under pure noise.

    The variance is 2 / dof with the degrees of freedom of the members' residuals. It is a scale for small sets, not
    the law of the score. ``left_out`` are the residuals, where known.
    """
    left_out = left_out or LeftOut.of(X, weights, frame)
    energy = _top_energy(left_out.squares, frame.rank).clamp(min=floor_energy(X))
    variance = 2.0 / max(left_out.benign.degrees_of_freedom(left_out.squares[frame.members]), 1.0)
    sizes = X.square().sum(dim=(1, 2)).clamp(min=floor_energy(X)).log()
    return without_size(energy.log(), sizes, frame.members, variance), variance


def without_size(x: Tensor, sizes: Tensor, members: Tensor, variance: float) -> Tensor:
    """Log scores (K,) without what the log energies ``sizes`` (K,) of the updates explain of them.

    The subspace is tilted by estimation and leaves out more of a larger update; and noise of a trained adapter grows
    with it. The slope is that of the members' scores on their sizes, in [0, 1], by ridge regression with prior standard
    deviation ``SLOPE`` around 0. An outsider's size counts no further than those of the members go: nobody hides a
    foreign part behind a large one.
    """
    own = sizes[members]
    deviation = sizes.clamp(own.min(), own.max()) - own.mean()
    product = torch.where(members, (x - x[members].mean()) * deviation, 0.0)  # a member's slope is that of the others
    square = torch.where(members, deviation.square(), 0.0)
    slope = (product.sum() - product) / (square.sum() - square + variance / SLOPE**2)
    return x - slope.clamp(0.0, 1.0) * deviation


def shared_structure(X: Tensor, weights: Tensor, frame: Frame, left_out: LeftOut | None = None) -> Tensor:
    """How much of the members' variation the subspace predicts for a client it has not seen, beyond chance; in [0, 1].

    1 - (energy of P_perp D left one out) / (energy of D left one out) less r / (p_eff + r), the part that any r
    directions of the noise take. 0 where the members do not differ; elsewhere at least ``LEAST_STRUCTURE``, so that
    modules without structure still count when there are no others. ``left_out`` are the residuals, where known.
    """
    benign = (left_out or LeftOut.of(X, weights, frame)).benign
    w, W = weights[frame.members], weights[frame.members].sum()
    D = centred(X, weights, frame)[frame.members].square().sum(dim=(1, 2))
    total = (D * w * W / (W - w)).sum()
    if total <= floor_energy(X) * frame.size:
        return total.new_zeros(())
    p_eff, _ = benign.effective_dimensions()
    return (1 - benign.R.square().sum() / total - frame.rank / (p_eff + frame.rank)).clamp(min=LEAST_STRUCTURE)
