"""Frames: fit an affine subspace to a set of clients.

A frame is a pair (P, C): the projector P onto an r-dimensional subspace of the output side, and the common part C off
this subspace (P C = 0). It stands for the affine subspace {C + U F}, where U (p, r) is a basis of the subspace and F
(r, q) is free. Throughout this package "frame" has this meaning.

The output side is the row side (p). Clients come as a float64 stack X (K, p, q) with weights w (K,): the noise variance
of client k is proportional to 1 / w_k. The first rows and columns, counted by ``shared_block`` (None: all), are
coordinates of all clients. The others are each client's own: orthogonal to those of every other client, although stored
at the same positions. Entries there have no part in the subspace, and enter the mean only through the client itself.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clairlib.linalg.downdating import held_out_energies
from clairlib.linalg.rank import EDGE_SPAN, estimate_rank, gap_rank, held_out_rank, resolved_rank
from clairlib.recovery.effective_dimensions import SharedBlock

ROUNDING_ENERGY = 1e-20  # energies below this fraction of a client's mean energy are rounding, not signal


@dataclass(frozen=True)
class Frame:
    """A frame (P, C) of dimension ``rank`` r, fitted to ``members`` (K,) bool, of which there are ``size``.

    ``basis`` U (p, r) with P = U U', unique up to rotation of its columns. ``mean`` M (p, q), the weighted mean of the
    members; C = P_perp M. ``eigenvalues`` (p,) of the members' weighted centred scatter, descending, and its
    ``eigenvectors`` (p, p), of which the first r are the basis. All are zero outside the ``shared_block``.
    """

    members: Tensor
    basis: Tensor
    mean: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor
    shared_block: SharedBlock

    @property
    def rank(self) -> int:
        return self.basis.shape[1]

    @property
    def size(self) -> int:
        return int(self.members.sum())


def rank_limit(members: int, p: int, q: int) -> int:
    """Return the largest rank that ``members`` clients support when each is left out in turn; at most p - 1."""
    return max(0, min(p - 1, (members - 2) * q, (members - 1) * q // 2 + 1))


def fit_frame(
    X: Tensor, weights: Tensor, members: Tensor, rank: int | None = None, shared_block: SharedBlock | None = None
) -> Frame:
    """Fit a frame: weighted mean M, leading eigenvectors of sum_k w_k (X_k - M)(X_k - M)'; rank estimated if None."""
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
    """Return X_k - M for clients with ``shares`` (K,) of M's weight; in own coordinates, M is X_k times its share."""
    D = X - mean
    rows, columns = shared_block
    if shared_block != X.shape[1:]:
        kept = (1 - shares)[:, None, None]
        D[:, rows:] *= kept
        D[:, :rows, columns:] *= kept
    return D


def centred(X: Tensor, weights: Tensor, frame: Frame) -> Tensor:
    """Return X_k - M (K, p, q). A client that is not a member has no weight in M."""
    W = weights[frame.members].sum()
    return _less_mean(X, torch.where(frame.members, weights / W, 0.0), frame.mean, frame.shared_block)


def keep_directions(X: Tensor, weights: Tensor, frame: Frame) -> Frame:
    """Return the frame with all directions that refinement should keep as the members' own.

    If a gap ends the spectrum, these are the frame's. If not, they are the directions that hold more signal than noise
    in held-out clients: the verdict is better with few directions, a refined client with every direction that pays.
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
    """Return E_k (n, p, q) of the members in eigenvector coordinates; without client k the scatter loses E_k E_k'."""
    w = weights[frame.members]
    loss = (w * w.sum() / (w.sum() - w)).sqrt()  # the scatter decreases by w_k W / (W - w_k) D_k D_k'
    return frame.eigenvectors.T @ centred(X, weights, frame)[frame.members] * loss[:, None, None]


def _rank(D: Tensor, values: Tensor, own: bool) -> int:
    """Estimate the rank of centred blocks D (n, p, q), whose scatter has the eigenvalues ``values``.

    ``own`` says whether clients have rows outside the shared block. If not, and if every client lies in the span of the
    others, there is no noise and every direction is shared. The noise of low-rank adapters also lies in few directions,
    but each client brings its own, and so does a client that shares nothing. The gap is searched among those.
    """
    n, p, q = D.shape
    resolved, limit = resolved_rank(values), rank_limit(n, p, q)
    if not own and resolved <= limit and resolved < min(p, (n - 1) * q):
        others = [_gram(rest - rest.mean(dim=0)) for rest in (torch.cat([D[:k], D[k + 1 :]]) for k in range(n))]
        if all(resolved_rank(values) == resolved for values in torch.linalg.eigvalsh(torch.stack(others)).flip(1)):
            return resolved
    if own:  # the last shared rows serve the common part, or belong to a few clients only
        resolved, limit = min(resolved, p // 2 + EDGE_SPAN), min(limit, p // 2)
    return estimate_rank(values[:resolved], limit)


def floor_energy(X: Tensor) -> float:
    """Return the energy below which a residual counts as exactly zero: the rounding of a client's mean energy."""
    energy = float(torch.linalg.vector_norm(X)) ** 2 / len(X)
    return max(ROUNDING_ENERGY * energy, torch.finfo(torch.float64).tiny)
