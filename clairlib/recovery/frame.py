"""Frames: a subspace with an off-subspace common part, fitted to a set of clients, and residuals left one out.

The output side is the row side (p). Clients come as a float64 stack X (K, p, q) with weights w (K,): the noise
variance of client k is proportional to 1 / w_k. The first rows and columns are coordinates that all clients have in
``shared_block``; the rest, where there are any, are each client's own, orthogonal to those of all others: what is there has
no part in the subspace, and in the mean of the members only through the client itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clairlib.linalg.downdating import held_out_energies
from clairlib.linalg.rank import EDGE_SPAN, estimate_rank, gap_rank, held_out_rank, resolved_rank
from clairlib.recovery.effective_dimensions import SharedBlock

ROUNDING_ENERGY = 1e-20  # energies below this part of the mean client's are rounding, not signal


@dataclass(frozen=True)
class Frame:
    """An r-frame (P, C) fitted to ``members``.

    ``basis`` U (p, r) with P = U U' (unique up to rotation of its columns), ``mean`` the weighted mean M (p, q) of the
    members (C = P_perp M), ``eigenvalues`` (p,) of their weighted centred scatter, descending, and its eigenvectors
    (p, p), of which the basis is the first r. ``shared_block`` (rows, columns) that all clients share: mean, eigenvalues and
    eigenvectors are of these, and zero elsewhere.
    """

    members: Tensor
    basis: Tensor
    mean: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor
    shared_block: SharedBlock

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
    X: Tensor, weights: Tensor, members: Tensor, rank: int | None = None, shared_block: SharedBlock | None = None
) -> Frame:
    """Frame of a set of clients: weighted mean, and the leading eigenvectors of the centred scatter.

    scatter = sum_k w_k (X_k - M)(X_k - M)'. ``rank=None`` estimates the rank; ``shared_block=None`` is all of p and q.
    """
    rows, columns = shared_block = shared_block or (X.shape[1], X.shape[2])
    w = weights[members]
    mean = torch.zeros_like(X[0])
    mean[:rows, :columns] = torch.einsum("k,kpq->pq", w / w.sum(), X[members, :rows, :columns])
    D = _less_mean(X[members], w / w.sum(), mean, shared_block)
    D, own = D[:, :rows], D[:, rows:]
    values, vectors = torch.linalg.eigh(_gram(D * w.sqrt()[:, None, None]))
    values, vectors = values.flip(0), vectors.flip(1)
    if rank is None:
        rank = _rank(D, values, bool(own.any()))
    vectors = torch.nn.functional.pad(vectors, (0, 0, 0, X.shape[1] - rows))
    return Frame(members, vectors[:, :rank], mean, values, vectors, shared_block)


def _less_mean(X: Tensor, shares: Tensor, mean: Tensor, shared_block: SharedBlock) -> Tensor:
    """X_k - M of clients that have these ``shares`` (K,) in the mean: all of what it has in their own coordinates."""
    D = X - mean
    rows, columns = shared_block
    if shared_block != X.shape[1:]:
        kept = (1 - shares)[:, None, None]
        D[:, rows:] *= kept
        D[:, :rows, columns:] *= kept
    return D


def centred(X: Tensor, weights: Tensor, frame: Frame) -> Tensor:
    """X_k - M (K, p, q); a client that is no member has no share in M."""
    W = weights[frame.members].sum()
    return _less_mean(X, torch.where(frame.members, weights / W, 0.0), frame.mean, frame.shared_block)


def keep_directions(X: Tensor, weights: Tensor, frame: Frame) -> Frame:
    """The frame with the directions that its members should keep of their own.

    Those of the gap that ends the spectrum. Where there is none, those that hold more signal than noise in clients held
    out: the verdict is better off with few directions, a client with all that pay.
    """
    if gap_rank(frame.eigenvalues[: resolved_rank(frame.eigenvalues)], frame.rank) == frame.rank:
        return frame
    largest = min(rank_limit(frame.size, frame.shared_block[0], X.shape[2]), resolved_rank(frame.eigenvalues))
    energies = held_out_energies(frame.eigenvalues.clamp(min=0.0), member_loads(X, weights, frame))
    rank = max(frame.rank, held_out_rank(energies, largest))
    return frame if rank == frame.rank else replace(frame, basis=frame.eigenvectors[:, :rank])


def _gram(D: Tensor) -> Tensor:
    return torch.einsum("kpq,krq->pr", D, D)


def member_loads(X: Tensor, weights: Tensor, frame: Frame) -> Tensor:
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


def floor_energy(X: Tensor) -> float:
    """Energy below which a residual counts as exactly zero: rounding of the mean client's energy."""
    energy = float(torch.linalg.vector_norm(X)) ** 2 / len(X)
    return max(ROUNDING_ENERGY * energy, torch.finfo(torch.float64).tiny)


