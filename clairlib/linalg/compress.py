"""Compressed cores of many adapters: coordinates that all clients share, and coordinates of each client's own.

K adapters of rank rho span N = K rho directions on either side. Only the leading directions of all clients together
hold what the clients share; each other direction belongs to one client. In these coordinates an update is a matrix of
size (lead + rho) x (lead + rho), computed from two Gram matrices alone. The part of other clients in a client's own
directions is neglected; in the mean of n clients it is 1 / n of their noise there, for which
`description_length.with_neglected` accounts.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from clairlib.linalg.grams import StackedFactors
from clairlib.linalg.rank import numerical_ranks
from clairlib.linalg.subspace import squared_singular_values

LEAD = 64  # shared coordinates on either side: leading directions of the members together
FILLED = 128  # most rows or columns that the adapters' noise fills, so that cores hold every direction
GUARD = 16  # directions in the subspace iteration beyond those kept
ROUNDS = 4  # rounds of the subspace iteration; directions of noise need not converge


@dataclass(frozen=True)
class Compressed:
    """Updates Theta_k in shared coordinates and each client's own coordinates: ``core`` (K, d + w, d' + w), float64.

    ``left`` (N, d) and ``right`` (N, d') are the coefficients of orthonormal bases of the shared directions, B @ left
    and A' @ right. ``shared_block`` = (d, d'). ``ranks`` (K,) are the numerical ranks of the updates.
    """

    core: Tensor
    left: Tensor
    right: Tensor
    ranks: Tensor

    @property
    def shared_block(self) -> tuple[int, int]:
        """Number of rows and of columns that are coordinates of all clients."""
        return self.left.shape[1], self.right.shape[1]


def leads(stacked: StackedFactors, rank: int | None = None, members: Tensor | None = None) -> tuple[int, int]:
    """Return how many shared directions to keep on the output and the input side.

    On a side of at most ``FILLED`` rows or columns, all directions are kept. On a longer side at most ``LEAD`` and at
    most three quarters of the directions of ``members`` (K,) bool, or of all clients, are kept: own directions of few
    clients would otherwise pass for shared. At least twice the shared ``rank``, if given, and twice the largest rank of
    a member are kept.
    """
    ranks = torch.tensor(stacked.ranks)[_members(stacked, members).cpu()]
    most = max(min(LEAD, 3 * int(ranks.sum()) // 4), 2 * int(ranks.max()), 2 * (rank or 0))
    p, q = stacked.B.shape[0], stacked.A.shape[1]
    return p if p <= FILLED else most, q if q <= FILLED else most


def compress(
    stacked: StackedFactors, lead: tuple[int, int], *, members: Tensor | None = None, generator: Generator
) -> Compressed:
    """Compress the clients' updates to cores with at most ``lead`` shared directions on either side.

    The shared directions of the output side are the leading directions of sum_k Theta_k Theta_k' / ||Theta_k||^2, so
    that a client does not count more for a larger update; those of the input side likewise. The sum is over ``members``
    (K,) bool, by default all clients: the spectrum of the members' scatter ends in their own noise only if other
    clients have chosen no direction.
    """
    members = _members(stacked, members)
    left, L = _side(stacked, lead[0], members, generator)
    right, R = _side(stacked.transposed(), lead[1], members, generator)
    return Compressed(stacked.scales[:, None, None] * (L @ R.mT), left, right, _ranks(stacked))


def _members(stacked: StackedFactors, members: Tensor | None) -> Tensor:
    return torch.ones_like(stacked.scales, dtype=torch.bool) if members is None else members


def _side(stacked: StackedFactors, lead: int, members: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return the basis (N, d), in B, of the output side's shared directions, and B_k in shared and own coordinates."""
    own = stacked.blocks(stacked.G_B)
    other = stacked.blocks(stacked.G_A)
    energies = (own * other).sum(dim=(1, 2))  # ||B_k A_k||^2
    shares = torch.where(members & (energies > 0), energies, torch.inf).rsqrt()
    basis, coordinates = _leading(stacked, _root(other) * shares[:, None, None], lead, generator)
    coordinates = stacked.by_client(coordinates)  # (K, d, w)
    rest = _root(own - coordinates.mT @ coordinates, 1e-7, own)
    return basis, torch.cat([coordinates, rest], dim=1)  # (K, d + w, w)


def _leading(stacked: StackedFactors, F: Tensor, lead: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return the ``lead`` leading left singular directions of B blockdiag(F) as coefficients (N, d), and B in them.

    The method is randomised subspace iteration (Halko, Martinsson and Tropp 2011) in the precision of the factors, then
    one Rayleigh-Ritz step in float64.
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
    """Return the numerical ranks (K,) of the updates, without directions that may be rounding of a Gram matrix."""
    rounding = stacked.width * torch.finfo(stacked.B.dtype).eps
    left, right = (_root(stacked.blocks(G), rounding) for G in (stacked.G_B, stacked.G_A))
    return numerical_ranks(squared_singular_values(stacked.scales[:, None, None] * (left @ right)))


def _root(blocks: Tensor, floor: float = 1e-14, whole: Tensor | None = None) -> Tensor:
    """Return the symmetric roots (K, w, w) of positive semidefinite blocks.

    Eigenvalues below ``floor`` times the trace of the block, or of the ``whole`` whose remainder it is, count as 0.
    """
    values, vectors = torch.linalg.eigh(blocks)
    size = (blocks if whole is None else whole).diagonal(dim1=1, dim2=2).sum(dim=1)
    return vectors * torch.where(values > floor * size[:, None], values, 0.0).sqrt()[:, None, :] @ vectors.mT
