"""Refined adapters from Gram matrices: shared subspace and common part of a set of clients, and refined updates.

A direction of the output side is a combination of the clients' factors, B v with coefficients v (N,).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from clairlib.linalg.grams import StackedFactors
from clairlib.linalg.low_rank import LowRank, truncate

GUARD = 8  # directions in the subspace iteration beyond those wanted
MOST_ROUNDS = 200  # few are needed if a gap ends the subspace; without a gap, a rank taken from noise converges slowly
CONVERGED = {torch.float64: 1e-11, torch.float32: 1e-7}  # residual over the spectral gap; it bounds the angle
ROUNDING = 1e-13
OFF_ROUNDS = 3  # directions of noise need not converge: more rounds lower the truncation error by about a thousandth
OFF_DIRECTIONS = 2  # directions of the common part that can enter refined adapters, as a multiple of their rank
PARTS = 4  # groups of clients whose refined adapters are computed one after the other


@dataclass(frozen=True)
class RefinedSubspace:
    """Shared subspace and off-subspace common part of a set of clients, as combinations of all clients' factors.

    The orthonormal basis is U = B ``basis``, (N, r). The common part is P_perp M = (B - U U' B) diag(``shares``) A;
    ``shares`` (N,) are the weights of the members' columns in their mean, times their scales.
    """

    stacked: StackedFactors
    basis: Tensor
    shares: Tensor

    def lifted_basis(self) -> Tensor:
        """Return U (p, r)."""
        return self.stacked.B @ self.basis.to(self.stacked.B.dtype)

    def common_part(self) -> LowRank:
        """Return P_perp M in factored form; its inner dimension is the sum of the members' ranks."""
        used, s = self.shares != 0, self.stacked
        U, B = self.lifted_basis(), s.B[:, used]
        return LowRank((B - U @ (U.T @ B)) * self.shares[used].to(B.dtype), s.A[used])


Adapters = Iterator[tuple[LowRank, float]]  # updates and their relative truncation errors
SharedParts = RefinedSubspace | tuple[Tensor, LowRank]  # U and P_perp M, as combinations of the factors or themselves


def shared_part(
    stacked: StackedFactors, members: Tensor, weights: Tensor, start: Tensor, rank: int, sizes: Tensor | None = None
) -> RefinedSubspace:
    """Return the leading directions of sum_k w_k (Theta_k - M)(Theta_k - M)' over the members (K,) bool, and M.

    Updates are divided by ``sizes`` (K,) if given.
    There are ``rank`` directions, or fewer if the members do not differ in so many. The method is subspace iteration
    with Rayleigh-Ritz steps from the combinations ``start`` (N, m), m >= rank. The scatter is B Omega B' with
    Omega = blockdiag(w_k c_k^2 G_A[k, k]) - (s_i s_j / W) G_A[i, j], s = w c.
    """
    w = torch.where(members, weights, 0.0)
    c, W = stacked.scales if sizes is None else stacked.scales / sizes, w.sum()
    by_column = (w * c)[stacked.owner]
    shares = by_column / W
    blocks = (w * c.square())[:, None, None] * stacked.blocks(stacked.G_A)

    def scatter(inner: Tensor) -> Tensor:
        """Return Omega G_B V for combinations V, given ``inner`` = G_B V."""
        own = stacked.times_blocks(blocks, inner)
        return own - by_column[:, None] * (stacked.G_A @ (shares[:, None] * inner))

    V, inner = orthonormal(start, stacked.G_B @ start)
    for _ in range(MOST_ROUNDS if rank else 0):
        rank = min(rank, V.shape[1])
        image = scatter(inner)
        seen = stacked.G_B @ image
        values, E = torch.linalg.eigh(inner.T @ image)
        values, E = values.flip(0), E.flip(1)
        V, inner, image, seen = V @ E, inner @ E, image @ E, seen @ E
        residual = image[:, :rank] - V[:, :rank] * values[:rank]
        gap = values[rank - 1] - (values[rank] if len(values) > rank else values.new_zeros(()))
        size = (residual * (stacked.G_B @ residual)).sum().clamp(min=0.0).sqrt()
        if float(size / gap.clamp(min=torch.finfo(gap.dtype).tiny)) <= CONVERGED[stacked.B.dtype]:
            break
        V, inner = orthonormal(image, seen)
    return RefinedSubspace(stacked, V[:, :rank], shares)


def orthonormal(V: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
    """Return combinations W of the columns of V, less those of rounding, with W' G W = I, and G W; ``inner`` = G V."""
    values, E = torch.linalg.eigh(V.T @ inner)
    kept = values > ROUNDING * values[-1:]
    E = (E[:, kept] * values[kept].rsqrt()).flip(1)
    return V @ E, inner @ E


def _near_off_part(shared: RefinedSubspace, count: int, generator: Generator) -> Tensor:
    """Return slightly more than ``count`` combinations near the leading left singular directions of P_perp M.

    The method is randomised subspace iteration off the subspace, in the precision of the factors.
    """
    s, w = shared.stacked, shared.shares[:, None]
    N, low = len(s.G_B), s.B.dtype
    inside = shared.basis.T @ s.G_B  # (r, N)
    G_B, G_A, basis, part, by = (x.to(low) for x in (s.G_B, s.G_A, shared.basis, inside, w))
    V = by * torch.randn(N, min(count + GUARD, N), generator=generator, dtype=torch.float32).to(G_B)
    for _ in range(OFF_ROUNDS):
        V = torch.linalg.qr(V - basis @ (part @ V))[0]
        V = by * (G_A @ (by * (G_B @ V)))
    V = V.double()
    return V - shared.basis @ (inside @ V)


@dataclass(frozen=True)
class Assembly:
    """The parts from which all refined adapters of a module are assembled.

    ``left`` (p, r + t): the shared subspace and t leading directions of the common part, in which it is ``outside``
    (t, q). ``gram`` (t, t), ``cross`` (t, N): inner products of the rows of ``outside`` with one another and with the
    rows of A. ``energy``: ||P_perp M||_F^2.
    """

    shared: RefinedSubspace
    left: Tensor
    outside: Tensor
    gram: Tensor
    cross: Tensor
    energy: float


def assemble(shared: RefinedSubspace, count: int, generator: Generator) -> Assembly:
    """Prepare the refined adapters of a module, with at most ``count`` directions of the common part."""
    s, dtype = shared.stacked, shared.stacked.B.dtype
    V = _near_off_part(shared, count, generator)
    V, inner = orthonormal(V, s.G_B @ V)
    rows = inner * shared.shares[:, None]  # V' M = rows' A
    cross = s.G_A @ rows
    E = torch.linalg.eigh(rows.T @ cross)[1].flip(1)[:, :count]
    Q, rows, cross = V @ E, (rows @ E).T, (cross @ E).T
    inside = shared.basis.T @ s.G_B * shared.shares  # U' M = inside @ A
    energy = float(shared.shares @ (s.G_A * s.G_B) @ shared.shares - ((inside @ s.G_A) * inside).sum())
    left = s.B @ torch.cat([shared.basis, Q], dim=1).to(dtype)
    return Assembly(shared, left, rows.to(dtype) @ s.A, cross @ rows.T, cross, energy)


def exact_update(basis: Tensor, common: LowRank, own: LowRank, scale: float = 1.0) -> LowRank:
    """Return U U' Theta_k + ``scale`` P_perp M of a client's ``own`` update, in float64, not truncated."""
    U = basis.double()
    inside = own.scale * (U.T @ own.B.double()) @ own.A.double()  # (r, q)
    return LowRank(torch.cat([U, scale * common.B], dim=1), torch.cat([inside, common.A]))


def refined_updates(
    parts: SharedParts, updates: Sequence[LowRank], clients: Sequence[int], ranks: Sequence[int], generator: Generator,
    scales: Tensor | None = None,
) -> Adapters:  # fmt: skip
    """Do as `refined_adapters` does; the results are the best of their ranks if U and P_perp M themselves are given."""
    if isinstance(parts, RefinedSubspace):
        return refined_adapters(assemble(parts, OFF_DIRECTIONS * max(ranks), generator), clients, ranks, scales)
    a = [1.0] * len(updates) if scales is None else scales.tolist()
    return (truncate(exact_update(*parts, updates[k], a[k]), n) for k, n in zip(clients, ranks, strict=True))


def refined_adapters(
    assembly: Assembly, clients: Sequence[int], ranks: Sequence[int], scales: Tensor | None = None
) -> Adapters:
    """Yield P Theta_k + a_k P_perp M of ``clients`` at adapter ranks ``ranks``, with the relative truncation errors.

    a_k are the ``scales`` (K,), by default 1. The factors are balanced and padded with zeros to exactly the rank. The
    result is the best in Frobenius norm among all updates that use the directions of ``assembly``. The clients are
    processed in groups, so small that their factors are few compared with B and A.
    """
    scales = torch.ones_like(assembly.shared.stacked.scales) if scales is None else scales
    step = max(1, len(assembly.shared.stacked.ranks) // PARTS)
    for i in range(0, len(clients), step):
        yield from _refined(assembly, clients[i : i + step], ranks[i : i + step], scales)


def _refined(assembly: Assembly, clients: Sequence[int], ranks: Sequence[int], scales: Tensor) -> Adapters:
    s, r = assembly.shared.stacked, assembly.shared.basis.shape[1]
    n, dtype, chosen = len(clients), s.B.dtype, torch.tensor(clients, device=s.B.device)
    coordinates = s.by_client(assembly.shared.basis.T @ s.G_B)[chosen]
    inside = s.scales[chosen, None, None] * coordinates  # (n, r, w): U' Theta_k = inside @ A_k
    a = scales[chosen, None, None]
    corner = a * (inside @ s.by_client(assembly.cross)[chosen].mT)
    upper = torch.cat([inside @ s.blocks(s.G_A)[chosen] @ inside.mT, corner], dim=2)
    lower = torch.cat([corner.mT, a.square() * assembly.gram], dim=2)
    gram = torch.cat([upper, lower], dim=1)  # Gram matrix of the rows of [U' Theta_k; a_k Q' M]
    values, E = torch.linalg.eigh(gram)
    most, least = max(ranks), min(max(ranks), values.shape[1])
    values, E = values.flip(1)[:, :least].clamp(min=0.0), E.flip(2)[:, :, :least]
    kept = torch.arange(least, device=values.device) < torch.tensor(ranks, device=values.device)[:, None]
    values = torch.where(kept, values, 0.0)
    total = gram[:, :r, :r].diagonal(dim1=1, dim2=2).sum(dim=1) + a[:, 0, 0].square() * assembly.energy
    lost = ((total - values.sum(dim=1)) / total).clamp(min=0.0).sqrt()
    errors = torch.where(total > 0, lost, 0.0).tolist()
    root = values.sqrt()
    down, up = E * root.sqrt()[:, None], E * torch.where(root > 0, root.rsqrt(), 0.0)[:, None]
    down, up = (torch.nn.functional.pad(side, (0, most - least)) for side in (down, up))  # (n, r + t, most)
    Bs = assembly.left.expand(n, -1, -1) @ down.to(dtype)
    As = ((a * up[:, r:]).mT.flatten(0, 1).to(dtype) @ assembly.outside).unflatten(0, (n, most))
    weights = (up[:, :r].mT @ inside).to(dtype)  # (n, most, w)
    starts = s.starts.tolist()
    for i, (k, rank) in enumerate(zip(clients, ranks, strict=True)):
        own = s.A[starts[k] : starts[k] + s.ranks[k]]
        A = As[i, :rank].addmm_(weights[i, :rank, : s.ranks[k]], own)
        yield LowRank(Bs[i, :, :rank], A), errors[i]
