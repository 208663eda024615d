"""Cores of many adapters: the directions that clients have in common, and each client's own.

K adapters of rank rho span N = K rho directions on either side. Only the leading ones of the clients together hold what
they share; the others are one client's each. In these coordinates an update is a matrix of (lead + rho) x (lead + rho),
got from two Gram matrices alone. What is neglected is the part that other clients have in a client's own directions: in
the mean of n of them it has 1 / n of the size of their noise there, which `description.with_neglected` counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from clairlib.linalg.grams import StackedFactors
from clairlib.linalg.rank import numerical_ranks
from clairlib.linalg.subspace import squared_singular_values

LEAD = 64  # leading directions of the members together, on either side, that are kept in common
FILLED = 128  # rows or columns up to which the noise of adapters fills them all, and cores hold everything
GUARD = 16  # directions iterated on beyond those kept
ROUNDS = 4  # of the subspace iteration: noise directions need not converge


@dataclass(frozen=True)
class Compressed:
    """Theta_k in coordinates common to all clients and its own: ``core`` (K, d + w, d' + w), float64.

    ``left`` (N, d) and ``right`` (N, d') are coefficients of orthonormal bases of the common directions: B @ left, and
    A' @ right. ``shared_block`` = (d, d'). ``ranks`` (K,) are the updates' numerical ranks.
    """

    core: Tensor
    left: Tensor
    right: Tensor
    ranks: Tensor

    @property
    def shared_block(self) -> tuple[int, int]:
        """Rows and columns that all clients have in common."""
        return self.left.shape[1], self.right.shape[1]


def leads(stacked: StackedFactors, rank: int | None = None, members: Tensor | None = None) -> tuple[int, int]:
    """Common directions to keep on the output and the input side, of ``members`` (K,) bool or of everybody.

    At most three quarters of all theirs, unless the side is so short that clients' directions fill it: the others are
    each client's own, which would else pass for shared where few clients span few directions. Twice the shared ``rank``
    at least, where it is given, and twice a member's.
    """
    ranks = torch.tensor(stacked.ranks)[_members(stacked, members).cpu()]
    most = max(min(LEAD, 3 * int(ranks.sum()) // 4), 2 * int(ranks.max()), 2 * (rank or 0))
    p, q = stacked.B.shape[0], stacked.A.shape[1]
    return p if p <= FILLED else most, q if q <= FILLED else most


def compress(
    stacked: StackedFactors, lead: tuple[int, int], *, members: Tensor | None = None, generator: Generator
) -> Compressed:
    """Cores of the clients' updates in at most ``lead`` common directions on either side, and their own.

    The common directions of the output side are the leading ones of sum_k Theta_k Theta_k' / ||Theta_k||^2, so that no
    client counts more for being large; those of the input side likewise. The sum is over ``members`` (K,) bool, or
    everybody: the spectrum of a set's scatter only ends in its own noise where the others chose no direction.
    """
    members = _members(stacked, members)
    left, L = _side(stacked, lead[0], members, generator)
    right, R = _side(stacked.transposed(), lead[1], members, generator)
    return Compressed(stacked.scales[:, None, None] * (L @ R.mT), left, right, _ranks(stacked))


def _members(stacked: StackedFactors, members: Tensor | None) -> Tensor:
    return torch.ones_like(stacked.scales, dtype=torch.bool) if members is None else members


def _side(stacked: StackedFactors, lead: int, members: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Basis (N, d), in B, of the output side's common directions, and the clients' B_k in coordinates (K, d + w, w)."""
    own = stacked.blocks(stacked.G_B)
    other = stacked.blocks(stacked.G_A)
    energies = (own * other).sum(dim=(1, 2))  # ||B_k A_k||^2
    shares = torch.where(members & (energies > 0), energies, torch.inf).rsqrt()
    basis, coordinates = _leading(stacked, _root(other) * shares[:, None, None], lead, generator)
    coordinates = stacked.by_client(coordinates)  # (K, d, w)
    rest = _root(own - coordinates.mT @ coordinates, 1e-7, own)
    return basis, torch.cat([coordinates, rest], dim=1)


def _leading(stacked: StackedFactors, F: Tensor, lead: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """The ``lead`` leading left singular directions of B blockdiag(F): coefficients (N, d) in B, and B in them (d, N).

    Randomised subspace iteration (Halko, Martinsson and Tropp 2011) in the precision of the factors, then one
    Rayleigh-Ritz step in float64.
    """
    N, dtype = len(stacked.G_B), stacked.B.dtype
    width = min(N, lead + GUARD)
    G, root, back = stacked.G_B.to(dtype), F.to(dtype), F.mT.to(dtype)
    Q = torch.randn(N, width, generator=generator, dtype=torch.float32).to(G)
    for _ in range(ROUNDS):
        Q = torch.linalg.qr(stacked.times_blocks(back, G @ stacked.times_blocks(root, Q)))[0]
    V = stacked.times_blocks(F, Q.double())
    image = stacked.G_B @ V
    values, E = torch.linalg.eigh(V.T @ image)
    kept = values.flip(0)[:lead]
    kept = kept[kept > ROUNDS * torch.finfo(dtype).eps * kept[0].clamp(min=torch.finfo(dtype).tiny)]
    E = E.flip(1)[:, : len(kept)] * kept.rsqrt()
    return V @ E, (image @ E).T


def _ranks(stacked: StackedFactors) -> Tensor:
    """Numerical ranks (K,) of the updates; directions of a factor that may be rounding of its Gram matrix are none."""
    rounding = stacked.width * torch.finfo(stacked.B.dtype).eps
    left, right = (_root(stacked.blocks(G), rounding) for G in (stacked.G_B, stacked.G_A))
    return numerical_ranks(squared_singular_values(stacked.scales[:, None, None] * (left @ right)))


def _root(blocks: Tensor, floor: float = 1e-14, whole: Tensor | None = None) -> Tensor:
    """Symmetric roots (K, w, w) of positive semidefinite blocks.

    Eigenvalues below the part ``floor`` of the trace, theirs or that of the ``whole`` of which they are left, are 0.
    """
    values, vectors = torch.linalg.eigh(blocks)
    size = (blocks if whole is None else whole).diagonal(dim1=1, dim2=2).sum(dim=1)
    return vectors * torch.where(values > floor * size[:, None], values, 0.0).sqrt()[:, None, :] @ vectors.mT
