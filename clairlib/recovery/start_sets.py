"""Start sets: small groups of clients that agree unusually well, from which consensus sets grow. Not from the paper."""

from itertools import combinations
from math import ceil, comb

import torch
from torch import Generator, Tensor

from clairlib.linalg.subspace import project_out
from clairlib.recovery.effective_dimensions import SharedBlock
from clairlib.recovery.frame import centred, fit_frame, floor_energy

# Largest number of tuples of clients that are scored. Up to K = 24 all pairs are scored, beyond that a random sample.
# If half of the clients are benign, a quarter of the pairs are benign; even at 90 % contamination, 300 pairs contain
# three benign ones on average.
TUPLE_LIMIT = 300
STARTS = 6  # start sets from which a set is grown: the first three, then disjoint ones
# A tuple must be able to span a frame of this rank; with fewer columns than this it has more than two clients.
START_RANK = 4
LEAST_SPREAD = 1e-12  # energies below this fraction of a client's mean energy do not tell tuples apart
CHUNK_ENTRIES = 2**23  # entries of the largest temporary tensor while tuples are scored


def candidate_tuples(K: int, p: int, q: int, *, generator: Generator) -> Tensor:
    """Return tuples of clients (T, t): all of them, or at most ``TUPLE_LIMIT`` distinct random ones.

    t = 2 if a pair can span a frame of rank ``START_RANK``, else ceil(START_RANK / q) + 1, at most K - 1.
    """
    t = max(2, min(ceil(min(START_RANK, p) / q) + 1, K - 1))
    if comb(K, t) <= TUPLE_LIMIT:
        return torch.tensor(list(combinations(range(K), t)))
    drawn = {tuple(sorted(torch.randperm(K, generator=generator)[:t].tolist())) for _ in range(TUPLE_LIMIT)}
    return torch.tensor(sorted(drawn))


def score_tuples(X: Tensor, tuples: Tensor, shared_block: SharedBlock | None = None) -> tuple[list[int], Tensor]:
    """Order the tuples by how closely the other clients gather around their frames; return this order, best first.

    Also return the off-frame energy (T, K) of each client, zero for the tuple's own clients. The frame of a tuple is
    over-specified on purpose: it has all directions of the differences between the tuple's clients, up to p / 4. Its
    score is the sum over the other clients of the log off-frame energy. Its influence is bounded: many distant clients
    cost little. Entries in a client's own coordinates are off every frame.
    """
    energies, shared_block = X.square().sum(dim=(1, 2)), shared_block or (X.shape[1], X.shape[2])
    X = X[:, : shared_block[0], : shared_block[1]]
    K, p, q = X.shape
    t = tuples.shape[1]
    width = max(1, min((t - 1) * q, p // 4, K * q))
    step = max(1, CHUNK_ENTRIES // (width * K * q + t * p * q))
    stacked = X.permute(1, 0, 2).reshape(p, K * q)
    gram = X.flatten(1) @ X.flatten(1).T
    floor = LEAST_SPREAD * float(gram.diagonal().mean()) + torch.finfo(torch.float64).tiny
    distances = []
    for part in tuples.split(step):
        group = X[part]  # (T, t, p, q)
        centre = group.mean(dim=1)
        D = (group[:, 1:] - group[:, :1]).permute(0, 2, 1, 3).flatten(2)  # (T, p, (t-1) q)
        U = torch.linalg.qr(D)[0] if width == D.shape[2] else torch.linalg.svd(D, full_matrices=False).U[..., :width]
        coefficients = (U.mT @ stacked).unflatten(2, (K, q)) - (U.mT @ centre)[:, :, None]  # (T, width, K, q)
        cross = gram[part].mean(dim=1)  # (T, K): <X_k, centre>
        energy = energies - 2 * cross + centre.square().sum(dim=(1, 2))[:, None]
        distances.append((energy - coefficients.square().sum(dim=(1, 3))).clamp(min=floor))
    result = torch.cat(distances)
    total = result.log().sum(dim=1) - result.log().gather(1, tuples.to(X.device)).sum(dim=1)
    return total.argsort().tolist(), result.scatter(1, tuples.to(X.device), 0.0)


def start_sets(
    X: Tensor, tuples: Tensor, order: list[int], distances: Tensor, allowed: Tensor, shortlist: int = TUPLE_LIMIT,
    shared_block: SharedBlock | None = None,
) -> list[Tensor]:
    """Return start sets (K,) bool among the allowed clients, most concentrated first.

    Each set consists of one of the best ``shortlist`` tuples and the two clients closest to its frame. The sets are
    ordered by the determinant of their centred scatter, as in the minimum covariance determinant (Rousseeuw 1984). It
    shows an error that the score of a pair misses: a frame through one client of each of two groups holds both
    subspaces, but its set has twice as many directions.
    """
    size = tuples.shape[1] + 2
    kept = bool(allowed.all())
    chosen = [i for i in order if kept or bool(allowed[tuples[i]].all())][:shortlist]
    if not chosen or int(allowed.sum()) < size:
        return []
    reach = distances[chosen].masked_fill(~allowed, torch.inf)
    sets = reach.argsort(dim=1)[:, :size].sort(dim=1).values.unique(dim=0)
    members = torch.zeros(len(sets), len(X), dtype=torch.bool, device=X.device).scatter(1, sets, True)
    return list(members[log_determinants(X, sets, shared_block).argsort()])


def log_determinants(X: Tensor, sets: Tensor, shared_block: SharedBlock | None = None) -> Tensor:
    """Return log determinants (T,) of the centred scatter of sets of clients (T, n), floored and up to a constant."""
    p, q = X.shape[1:]
    floor = LEAST_SPREAD * float(X.square().sum(dim=(1, 2)).mean()) + torch.finfo(X.dtype).tiny
    step = max(1, CHUNK_ENTRIES // (sets.shape[1] * p * q + p * p))
    result = []
    for part in sets.split(step):
        D = _apart(X[part], shared_block)
        D = (D - D.mean(dim=1, keepdim=True)).permute(0, 2, 1, 3).flatten(2)  # (T, p, n q)
        gram = D @ D.mT if D.shape[1] <= D.shape[2] else D.mT @ D
        gram.diagonal(dim1=1, dim2=2).add_(floor)
        result.append(torch.linalg.slogdet(gram).logabsdet)
    return torch.cat(result)


def _apart(X: Tensor, shared_block: SharedBlock | None) -> Tensor:
    """Return sets of clients (T, n, p, q) in joint coordinates; the clients' own rows and columns do not overlap."""
    T, n, p, q = X.shape
    if shared_block is None or (p, q) == shared_block:
        return X
    rows, columns = shared_block
    own_rows, own_columns = p - rows, q - columns
    placed = X.new_zeros(T, n, rows + n * own_rows, columns + n * own_columns)
    for k in range(n):
        at = torch.cat([torch.arange(rows), torch.arange(own_rows) + rows + k * own_rows])
        beside = torch.cat([torch.arange(columns), torch.arange(own_columns) + columns + k * own_columns])
        placed[:, k, at[:, None], beside] = X[:, k]
    return placed


def spread_starts(sets: list[Tensor]) -> list[Tensor]:
    """Return the first three sets, then sets without a client of an earlier one; ``STARTS`` in all at most."""
    starts = sets[:3]
    for members in sets:
        if not any(bool((members & start).any()) for start in starts):
            starts.append(members)
        if len(starts) == STARTS:
            break
    return starts


def robust_half(X: Tensor, weights: Tensor, rank: int | None, shared_block: SharedBlock | None = None) -> Tensor:
    """Return the half of the clients (K,) bool closest to a frame fitted to all of them with weights 1 / distance.

    The frame is fitted by 15 rounds of reweighted least squares, as in FMS (Lerman and Maunu 2018), on matrices. It
    averages over every client, for data in which single pairs are too noisy.
    """
    K, shared_block = len(X), shared_block or (X.shape[1], X.shape[2])
    width = rank if rank is not None else max(1, min(max(shared_block[1], START_RANK), shared_block[0] // 4))
    everyone = torch.ones(K, dtype=torch.bool, device=X.device)
    v, floor = weights, floor_energy(X)
    for _ in range(15):
        frame = fit_frame(X, v, everyone, width, shared_block)
        distance = project_out(frame.basis, centred(X, v, frame)).square().sum(dim=(1, 2)) * weights
        v = weights * distance.clamp(min=floor).rsqrt()
        v = v / v.mean()
    half = torch.zeros_like(everyone)
    half[distance.argsort()[: max(min(4, K), K // 2)]] = True
    return half
